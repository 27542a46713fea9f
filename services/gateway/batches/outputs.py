"""The files that a batch produces: records of FileService, whose content is an object that the batch has written.

For activities of the batch's workflow.
"""

from typing import Final

from temporalio import activity

from jobs.ids import file_id, is_below
from llm_pb import batch_pb2, common_pb2, file_pb2
from services.gateway.files.produced import ProducedFiles

OUTPUT: Final = "output"
ERRORS: Final = "errors"
_PURPOSE: Final = "batch_output"


class BatchFiles:
    """Creates the records of a batch's files."""

    def __init__(self, files: ProducedFiles) -> None:
        self._files = files

    def prefix(self, batch: batch_pb2.BatchRequest, batch_id: str, tenant: str, kind: str) -> str:
        """Return a new prefix for the object of a file."""
        return self._files.prefix(_id(batch, batch_id, tenant, kind), tenant)

    async def record(
        self, batch: batch_pb2.BatchRequest, batch_id: str, tenant: str, kind: str, written: common_pb2.FileRef
    ) -> common_pb2.FileRef:
        """Return the file whose content an object is; the one of an earlier attempt if there is one.

        Raises RPCError, KeysUnavailable.
        """
        file = file_pb2.File(
            ref=written, user_id=batch.user_id, filename=f"{batch.request_id}-{kind}.jsonl", purpose=_PURPOSE
        )
        file.ref.file_id = _id(batch, batch_id, tenant, kind)
        return await self._files.record(file, tenant, written.file_id)


def _id(batch: batch_pb2.BatchRequest, batch_id: str, tenant: str, kind: str) -> str:
    # A step of a pipeline that goes on may run again under its id, and has other files then.
    run = f"/{activity.info().workflow_run_id}" if is_below(batch_id) else ""
    # No request_id of an upload has a slash.
    return file_id(batch.user_id, f"batch/{batch_id}{run}/{kind}", tenant)
