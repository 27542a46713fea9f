"""The activities of LLMPipelineWorkflow that check a step as its call does, and publish the tree."""

import asyncio
import json
from typing import Final

from google.protobuf.timestamp_pb2 import Timestamp
from temporalio import activity
from temporalio.client import WorkflowExecutionDescription
from temporalio.exceptions import ApplicationError

from batches.rules import check_create
from feed.feed import Feed
from jobs import names
from jobs.ids import tenant_of
from jobs.limits import MAX_STEP_INLINE_BYTES
from jobs.memo import from_memo
from jobs.rules import check_submit
from jobs.schema_length import longest_json
from llm_pb import batch_pb2, common_pb2, internal_pb2, llm_pb2, pipeline_pb2
from payload_converter import PayloadError
from runtime.auth import Caller
from runtime.scopes import SCOPES
from services.gateway.batches.reader import ended_record
from services.gateway.batches.submission import batch_options, check_input
from services.gateway.errors import ApiError, JobDeleted, JobNotFound, invalid
from services.gateway.files.reader import FileReader
from services.gateway.job_bounds import JobBounds
from services.gateway.job_options import job_options
from services.gateway.job_reader import JobReader
from services.gateway.models.catalogue import Models
from services.gateway.pipelines.reader import closed_status
from services.gateway.pipelines.texts import fail
from services.gateway.runs import Runs
from services.gateway.scopes import gateway_for
from services.gateway.settings import GatewaySettings

_MAX_RECORD_BYTES: Final = 256 * 1024
"""Maximum size of a change in the feed. Its readers ask Temporal for a larger one."""


class PipelineSteps:
    """What pipelines need of a gateway while they run."""

    def __init__(
        self,
        models: Models,
        settings: GatewaySettings,
        bounds: JobBounds,
        files: FileReader,
        feed: Feed,
        reader: JobReader,
        runs: Runs,
        *,
        has_store: bool,
    ) -> None:
        """`has_store`: whether a large output may become a file."""
        self._files = files
        self._models = models
        self._settings = settings
        self._bounds = bounds
        self._feed = feed
        self._reader = reader
        self._runs = runs
        self._has_store = has_store

    @activity.defn(name=names.ACTIVITY_ADMIT_STEP)
    async def admit_step(self, job: llm_pb2.JobRequest) -> internal_pb2.JobOptions:
        """Return the options of a step's job. The models, limits and defaults are those of this moment.

        Raises ApplicationError with the reason for a job that is refused.
        """
        request = llm_pb2.SubmitRequest(job=job)
        try:
            violations = [*check_submit(request), *await self._bounds.check(request, _owner(job.user_id))]
        except ApiError as error:
            fail(error)
        if violations:
            message = "; ".join(f"{field} {description}" for field, description in violations)
            raise ApplicationError(message, type="INVALID_JOB", non_retryable=True)
        chosen = job_options(self._settings, self._models, job, has_store=self._has_store)
        # Nobody is notified of a step.
        chosen.notify_operator = False
        chosen.max_inline_bytes = MAX_STEP_INLINE_BYTES
        chosen.default_max_tokens = max(chosen.default_max_tokens, self._tokens_of_form(job))
        return chosen

    @activity.defn(name=names.ACTIVITY_ADMIT_STEPS)
    async def admit_steps(self, request: internal_pb2.AdmitStepsRequest) -> internal_pb2.AdmitStepsResponse:
        """Return the options of the jobs of several steps, except of those that admit_step() raises an error for."""
        answer, known = internal_pb2.AdmitStepsResponse(), dict[bytes, int]()
        for chosen in await asyncio.gather(*map(self.admit_step, request.jobs), return_exceptions=True):
            if isinstance(chosen, BaseException):
                answer.numbers.append(-1)
                continue
            number = known.setdefault(chosen.SerializeToString(deterministic=True), len(known))
            if number == len(answer.options):
                answer.options.append(chosen)
            answer.numbers.append(number)
        return answer

    def _tokens_of_form(self, job: llm_pb2.JobRequest) -> int:
        """Return the number of characters of the longest JSON of the job's schema, at most what the model may generate.

        With a token for each of them it is not cut, unless they take several tokens each. 0 for a schema that does not
        bound its JSON, and without one.
        """
        model = self._models.get(job.model)
        if model is None or not job.params.HasField("json_schema"):
            return 0
        return min(longest_json(json.loads(job.params.json_schema)) or 0, model.max_output_tokens)

    @activity.defn(name=names.ACTIVITY_ADMIT_BATCH)
    async def admit_batch(self, batch: batch_pb2.BatchRequest) -> internal_pb2.BatchOptions:
        """Return the options of a step's batch. Raises ApplicationError with the reason for one that is refused."""
        request = batch_pb2.CreateBatchRequest(batch=batch)
        try:
            if violations := check_create(request):
                raise invalid(violations)
            await check_input(self._files, _owner(batch.user_id), batch, self._settings)
        except ApiError as error:
            fail(error)
        now = Timestamp()
        now.GetCurrentTime()
        return batch_options(self._settings, batch, now, sorted(SCOPES))

    @activity.defn(name=names.ACTIVITY_RECALL_STEP)
    async def recall_step(self, job_id: str) -> llm_pb2.JobResult:
        """Return the result of a step's job, of an earlier run of its pipeline; an empty one unless it has succeeded.

        Raises ApplicationError, which cannot be retried, for a job that was deleted: its id stays taken.
        """
        try:
            found = await self._reader.get(gateway_for(job_id), job_id)
        except JobDeleted as error:
            raise ApplicationError(error.status.message, type="JOB_DELETED", non_retryable=True) from error
        except JobNotFound:
            return llm_pb2.JobResult()
        return found.result if found.status.state == llm_pb2.JOB_STATE_SUCCEEDED else llm_pb2.JobResult()

    @activity.defn(name=names.ACTIVITY_LEFT_USAGE)
    async def left_usage(self, workflow_id: str) -> pipeline_pb2.PipelineResult:
        """Return usage and counts of a step whose workflow has closed without a result; empty if it tells none.

        Raises RPCError, KeysUnavailable.
        """
        found = await self._runs.describe(workflow_id)
        try:
            return pipeline_pb2.PipelineResult() if found is None else await _left_by(found)
        except (PayloadError, ValueError):
            # No one will ever read it.
            return pipeline_pb2.PipelineResult()

    @activity.defn(name=names.ACTIVITY_PUBLISH_PIPELINE)
    async def publish_pipeline(self, change: internal_pb2.PipelineChange) -> None:
        """Append a change of the tree to the pipeline's feed."""
        info = activity.info()
        if change.ByteSize() > _MAX_RECORD_BYTES:
            # It belongs to no version that a reader has.
            change = internal_pb2.PipelineChange(
                since=change.record.version, record=internal_pb2.PipelineRecord(version=change.record.version)
            )
        feed = self._feed.of_tenant(tenant_of(info.workflow_id or ""))
        await feed.append(info.workflow_run_id or "", internal_pb2.FeedRecord(pipeline_change=change))


async def _left_by(found: WorkflowExecutionDescription) -> pipeline_pb2.PipelineResult:
    """Return what the memo of a closed job, batch or pipeline tells. Raises PayloadError, KeysUnavailable."""
    left = pipeline_pb2.PipelineResult()
    if found.workflow_type == names.PIPELINE_WORKFLOW_TYPE:
        root = (await closed_status(found)).root
        left.usage.CopyFrom(root.usage)
        if root.HasField("counts"):
            left.counts.CopyFrom(root.counts)
    elif found.workflow_type == names.BATCH_WORKFLOW_TYPE:
        if (record := await ended_record(found)) is not None:
            left.usage.CopyFrom(record.status.usage)
            left.counts.CopyFrom(record.status.counts)
    elif (usage := from_memo(await found.memo_value(names.MEMO_USAGE, None), common_pb2.Usage)) is not None:
        left.usage.CopyFrom(usage)
    return left


def _owner(user_id: str) -> Caller:
    """Return who may read the files of a pipeline's steps: the pipeline's user."""
    return Caller(tenant_of(activity.info().workflow_id or ""), "", SCOPES, user_id=user_id)
