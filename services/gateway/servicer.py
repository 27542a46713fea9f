"""The methods of LlmService: each calls the object that implements it.

Requests arrive parsed and checked. Errors are raised as ApiError or RPCError: see services.gateway.interceptor.
"""

import asyncio
from collections.abc import AsyncGenerator, Mapping
from typing import Any, Final

import grpc
from temporalio.client import Client

from llm_pb import llm_pb2, llm_pb2_grpc
from runtime.answers import Answers
from runtime.grpc_auth import current_caller
from services.gateway.cancel import JobCancellation
from services.gateway.deletion.service import DeletionService
from services.gateway.delivery_service import DeliveryService
from services.gateway.files.quotas import FileQuotas
from services.gateway.job_inputs import JobInputs, expected_bytes
from services.gateway.job_reader import JobReader
from services.gateway.job_record import expected_result_bytes
from services.gateway.job_traces import link_call
from services.gateway.listing import JobListing
from services.gateway.models.catalogue import Models
from services.gateway.models.trained import TrainedModels
from services.gateway.models.workers import Workers
from services.gateway.quotas.admission import OpenJobQuotas, RequestQuotas
from services.gateway.streams.streams import Streams
from services.gateway.submission import JobSubmission
from services.gateway.tenants import TenantSettings

_Context = grpc.aio.ServicerContext[Any, Any]
TRACE_ID_KEY: Final = "trace-id"
"""Key of the trailing metadata of Submit."""
_DEFAULT_TENANT: Final = TenantSettings()


class LlmServicer(llm_pb2_grpc.LlmServiceServicer):
    """The methods of llm.proto."""

    def __init__(
        self,
        client: Client,
        submission: JobSubmission,
        cancellation: JobCancellation,
        listing: JobListing,
        deliveries: DeliveryService,
        deletions: DeletionService,
        models: Models,
        trained: TrainedModels,
        workers: Workers,
        reader: JobReader,
        inputs: JobInputs,
        streams: Streams,
        requests: RequestQuotas,
        open_jobs: OpenJobQuotas,
        files: FileQuotas,
        answers: Answers,
        tenants: Mapping[str, TenantSettings],
    ) -> None:
        self._tenants = tenants
        self._requests = requests
        self._open_jobs = open_jobs
        self._files = files
        self._answers = answers
        self._client = client
        self._submission = submission
        self._cancellation = cancellation
        self._listing = listing
        self._deliveries = deliveries
        self._deletions = deletions
        self._models = models
        self._trained = trained
        self._workers = workers
        self._reader = reader
        self._inputs = inputs
        self._streams = streams

    async def Submit(self, request: llm_pb2.SubmitRequest, context: _Context) -> llm_pb2.SubmitResponse:
        """See llm.proto."""
        return _with_trace_id(await self._submission.submit(current_caller(), request), context)

    async def submit_refused(self, request: llm_pb2.SubmitRequest, context: _Context) -> llm_pb2.SubmitResponse | None:
        """Return the answer to a Submit that breaks the rules but whose job exists; None if it has to be refused."""
        response = await self._submission.find_accepted(current_caller(), request)
        return response and _with_trace_id(response, context)

    async def GetStatus(self, request: llm_pb2.GetStatusRequest, context: _Context) -> llm_pb2.GetStatusResponse:
        """See llm.proto."""
        description = await self._reader.describe(current_caller(), request.workflow_id)
        await link_call(description)
        await self._answers.of(context).reserve(await expected_result_bytes(description))
        return await self._reader.status_of(description)

    async def GetJob(self, request: llm_pb2.GetJobRequest, context: _Context) -> llm_pb2.GetJobResponse:
        """See llm.proto."""
        description = await self._reader.describe(current_caller(), request.workflow_id)
        await link_call(description)
        await self._answers.of(context).reserve(await expected_bytes(description))
        now = await self._reader.status_of(description)
        job = await self._inputs.get(description)
        result = now.result if now.HasField("result") else None
        return llm_pb2.GetJobResponse(job=job, status=now.status, result=result, attempts=now.attempts)

    def StreamStatus(
        self, request: llm_pb2.StreamStatusRequest, context: _Context
    ) -> AsyncGenerator[llm_pb2.StreamStatusResponse, None]:
        """See llm.proto."""
        return self._streams.stream(current_caller(), request, self._answers.of(context))

    async def Cancel(self, request: llm_pb2.CancelRequest, context: _Context) -> llm_pb2.CancelResponse:
        """See llm.proto."""
        response = await self._cancellation.cancel(current_caller(), request)
        self._streams.expect_end(request.workflow_id)
        return response

    async def List(self, request: llm_pb2.ListRequest, context: _Context) -> llm_pb2.ListResponse:
        """See llm.proto."""
        response = await self._listing.list_page(current_caller(), request)
        # Labels may make it larger than what is reserved for a page without them.
        await self._answers.of(context).reserve(response.ByteSize())
        return response

    async def ListModels(self, request: llm_pb2.ListModelsRequest, context: _Context) -> llm_pb2.ListModelsResponse:
        """See llm.proto."""
        tenant = current_caller().tenant
        models, trained = await asyncio.gather(
            self._models.infos(self._client, tenant, self._workers.serves), self._trained.all(tenant)
        )
        response = llm_pb2.ListModelsResponse(models=models, trained=trained)
        await self._answers.of(context).reserve(response.ByteSize())
        return response

    async def SetModelAlias(
        self, request: llm_pb2.SetModelAliasRequest, context: _Context
    ) -> llm_pb2.SetModelAliasResponse:
        """See llm.proto."""
        return llm_pb2.SetModelAliasResponse(model=await self._trained.set_alias(current_caller().tenant, request))

    async def DeleteModelVersion(
        self, request: llm_pb2.DeleteModelVersionRequest, context: _Context
    ) -> llm_pb2.DeleteModelVersionResponse:
        """See llm.proto."""
        changed = await self._trained.delete_version(current_caller().tenant, request)
        return llm_pb2.DeleteModelVersionResponse(model=changed)

    async def ListWorkers(self, request: llm_pb2.ListWorkersRequest, context: _Context) -> llm_pb2.ListWorkersResponse:
        """See llm.proto."""
        response = llm_pb2.ListWorkersResponse(workers=self._workers.infos(request.model))
        await self._answers.of(context).reserve(response.ByteSize())
        return response

    async def ListDeliveries(
        self, request: llm_pb2.ListDeliveriesRequest, context: _Context
    ) -> llm_pb2.ListDeliveriesResponse:
        """See llm.proto."""
        return await self._deliveries.list_all(current_caller(), request)

    async def Redeliver(self, request: llm_pb2.RedeliverRequest, context: _Context) -> llm_pb2.RedeliverResponse:
        """See llm.proto."""
        return await self._deliveries.redeliver(current_caller(), request)

    async def GetQuota(self, request: llm_pb2.GetQuotaRequest, context: _Context) -> llm_pb2.GetQuotaResponse:
        """See llm.proto."""
        caller = current_caller()
        tenant = caller.tenant
        return llm_pb2.GetQuotaResponse(
            user_id=caller.user_id,
            tenant=tenant,
            requests=self._requests.of(tenant),
            open_jobs=await self._open_jobs.of(tenant),
            files=await self._files.of(tenant),
            output_tokens=await self._open_jobs.tokens_of(tenant),
            weight=self._tenants.get(tenant, _DEFAULT_TENANT).weight if tenant else None,
        )

    async def DeleteJob(self, request: llm_pb2.DeleteJobRequest, context: _Context) -> llm_pb2.DeleteJobResponse:
        """See llm.proto."""
        response = await self._deletions.delete_job(current_caller(), request)
        self._streams.expect_end(request.workflow_id)
        return response

    async def DeleteJobs(self, request: llm_pb2.DeleteJobsRequest, context: _Context) -> llm_pb2.DeleteJobsResponse:
        """See llm.proto."""
        return await self._deletions.delete_jobs(current_caller(), request)

    async def DeleteUser(self, request: llm_pb2.DeleteUserRequest, context: _Context) -> llm_pb2.DeleteUserResponse:
        """See llm.proto."""
        return await self._deletions.delete_user(current_caller(), request)

    async def GetDeletion(self, request: llm_pb2.GetDeletionRequest, context: _Context) -> llm_pb2.GetDeletionResponse:
        """See llm.proto."""
        return await self._deletions.get_deletion(current_caller(), request)


def _with_trace_id(response: llm_pb2.SubmitResponse, context: _Context) -> llm_pb2.SubmitResponse:
    if response.status.trace_id:
        context.set_trailing_metadata(((TRACE_ID_KEY, response.status.trace_id),))
    return response
