"""The files of a pipeline, in the store of FileService: those of its user."""

from datetime import timedelta
from typing import Final

from temporalio import workflow
from temporalio.common import RetryPolicy

with workflow.unsafe.imports_passed_through():
    from jobs.pipelines import MAX_TEXT_BYTES, OUTPUT_TOO_LARGE, failure
    from llm_pb import common_pb2, internal_pb2
    from pipelines.errors import StepFailed, failing_as

from pipelines.execution import Execution
from workflows import activities

TEXT: Final = "text/plain; charset=utf-8"
JSON_LINES: Final = "application/jsonl"
_TRY: Final = timedelta(minutes=1)
_RETRIES: Final = RetryPolicy(initial_interval=timedelta(seconds=1), maximum_interval=timedelta(seconds=30))
"""Without a last attempt: a store that is away delays the pipeline, within its time."""


class Files:
    """Reads and writes files. They are named by references, which may be passed on: to a job, to a batch, in a result.

    A text that is read or written is in the history of the pipeline, which has 50 MiB in all. One that is passed on by
    its reference is not.
    """

    def __init__(self, execution: Execution, below: str) -> None:
        """`below` is the beginning of the paths of steps."""
        self._execution = execution
        self._below = below

    async def put(self, name: str, text: str, *, media_type: str = TEXT) -> common_pb2.FileRef:
        """Write a file of at most 1 MiB as a step, and return it.

        It is a file of the pipeline's user, counts for the quotas of files, and expires as an uploaded one does. Raises
        StepFailed.
        """
        execution = self._execution
        async with execution.step(f"{self._below}{name}") as step:
            _require_small(step.path, len(text.encode()))
            request = internal_pb2.WriteTextRequest(
                path=step.path, user_id=execution.pipeline.user_id, text=text, media_type=media_type
            )
            await execution.room.take(request)
            ref = await workflow.execute_activity(
                activities.write_text,
                request,
                start_to_close_timeout=_TRY,
                schedule_to_close_timeout=execution.within(step.path, None),
                retry_policy=_RETRIES,
            )
            execution.tree.change(step.path).files.append(ref)
            return ref

    async def get(self, ref: common_pb2.FileRef) -> str:
        """Return the text of a file of the pipeline's user, or of the output of a job, of at most 1 MiB.

        Raises StepFailed, with the reason FILE_NOT_FOUND, FILE_IS_NO_TEXT or OUTPUT_TOO_LARGE.
        """
        execution = self._execution
        async with failing_as(ref.file_id):
            _require_small(ref.file_id, ref.size_bytes)
            text = await workflow.execute_activity(
                activities.read_text,
                internal_pb2.ReadTextRequest(file=ref, user_id=execution.pipeline.user_id),
                start_to_close_timeout=_TRY,
                schedule_to_close_timeout=execution.within(ref.file_id, None),
                retry_policy=_RETRIES,
            )
            execution.room.add(text)
            return text


def _require_small(path: str, size: int) -> None:
    if size > MAX_TEXT_BYTES:
        message = f"a text in a pipeline has at most {MAX_TEXT_BYTES} bytes, not {size}: pass it on as a file"
        raise StepFailed(path, failure(OUTPUT_TOO_LARGE, message))
