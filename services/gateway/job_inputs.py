"""Reads what a workflow was started with, such as a JobRequest: the input in the first event of its history."""

from typing import TypeVar

from google.protobuf.message import Message
from temporalio.api.history.v1 import HistoryEvent
from temporalio.client import Client, WorkflowExecutionDescription
from temporalio.converter import DataConverter, WorkflowSerializationContext
from temporalio.service import RPCError, RPCStatusCode

from llm_pb import llm_pb2
from payload_converter import MAX_PAYLOAD_BYTES, PayloadError
from runtime.shared_calls import SharedCalls
from runtime.temporal import RPC_TIMEOUT
from services.gateway.errors import not_found
from services.gateway.job_record import expected_result_bytes

_M = TypeVar("_M", bound=Message)


class JobInputs:
    """Reads the inputs of jobs from Temporal."""

    def __init__(self, client: Client) -> None:
        self._client = client
        self._shared = SharedCalls()

    async def get(self, description: WorkflowExecutionDescription) -> llm_pb2.JobRequest | None:
        """Return the job that a workflow was started with, None for one whose input is no job.

        Concurrent calls share the answer, so it must not be changed. Raises ApiError NOT_FOUND for a workflow that
        was deleted since it was described; RPCError when Temporal is unavailable; PayloadError for an input that can
        never be decrypted again; KeysUnavailable.
        """
        # The input of a run never changes.
        return await self._shared.joined(description.run_id, lambda: self._get(description))

    async def _get(self, description: WorkflowExecutionDescription) -> llm_pb2.JobRequest | None:
        handle = self._client.get_workflow_handle(description.id, run_id=description.run_id)
        try:
            started = await anext(handle.fetch_history_events(page_size=1, rpc_timeout=RPC_TIMEOUT))
        except RPCError as error:
            if error.status == RPCStatusCode.NOT_FOUND:
                raise not_found(description.id) from error
            raise
        context = WorkflowSerializationContext(namespace=self._client.namespace, workflow_id=description.id)
        return await input_of(started, self._client.data_converter.with_context(context), llm_pb2.JobRequest)


async def input_of(started: HistoryEvent, converter: DataConverter, kind: type[_M]) -> _M | None:
    """Return the input in the event that started a workflow; None for another kind. Raises like JobInputs.get."""
    payloads = list(started.workflow_execution_started_event_attributes.input.payloads)
    if len(payloads) != 1:
        # The workflow takes it for none, too: see jobs.inputs.
        return None
    if converter.payload_codec is not None:
        payloads = await converter.payload_codec.decode(payloads)
    try:
        (value,) = converter.payload_converter.from_payloads(payloads, [kind])
    except (PayloadError, RuntimeError):
        # Whoever started it by hand sent something else, of an unknown type perhaps.
        return None
    return value if isinstance(value, kind) else None


async def expected_bytes(description: WorkflowExecutionDescription) -> int:
    """Return the maximum size, in bytes, of the input and the result of a job together."""
    history_bytes: int = description.raw_description.workflow_execution_info.history_size_bytes
    return min(history_bytes, MAX_PAYLOAD_BYTES) + await expected_result_bytes(description)
