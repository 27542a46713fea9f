"""JSON that the job of a step has generated, against the schema that it was asked to keep.

Our engines keep a schema. A provider may not, and an output that is cut is no JSON.
"""

import json
from collections.abc import Mapping
from typing import Any

from temporalio import workflow

with workflow.unsafe.imports_passed_through():
    from jobs import names
    from jobs.pipelines import INVALID_OUTPUT, failure
    from jobs.schema_fit import misfit
    from llm_pb import llm_pb2
    from pipelines.errors import StepFailed

from pipelines.files import Files


class Form:
    """The form of the JSON that the job of one step generates."""

    def __init__(self, schema: Mapping[str, Any], files: Files) -> None:
        self._schema = dict(schema)
        self._files = files
        self._recalled: tuple[Any] | None = None

    async def value(self, path: str, result: llm_pb2.JobResult) -> Any:
        """Return the JSON of the job of a step. Raises StepFailed: INVALID_OUTPUT for another form, as Files.get()."""
        return await self._read(path, result) if self._recalled is None else self._recalled[0]

    async def is_usable(self, result: llm_pb2.JobResult) -> bool:
        """Return whether value() returns what a job has made in an earlier run. A job of which it does not runs again.

        What it returns is kept for value(), so that a file is read once.
        """
        if result.HasField("output_file") and not workflow.patched(names.PATCH_RECALLS_FILES):
            return False
        try:
            self._recalled = (await self._read("", result),)
        except StepFailed:
            return False
        return True

    async def _read(self, path: str, result: llm_pb2.JobResult) -> Any:
        text = await self._files.get(result.output_file) if result.HasField("output_file") else result.output
        try:
            value = json.loads(text)
        except (ValueError, RecursionError) as error:
            wrong = f"the output is no JSON: {error}"
            if result.finish_reason == llm_pb2.FINISH_REASON_LENGTH:
                wrong = f"the output was cut after {result.metadata.output_tokens} tokens, so its JSON is incomplete"
            raise StepFailed(path, failure(INVALID_OUTPUT, wrong)) from None
        # The steps that an earlier version has run are not checked.
        if (misfits := misfit(value, self._schema)) is not None and workflow.patched(names.PATCH_FORMS):
            message = f"the output does not keep the schema, as a provider may not: {misfits}"
            raise StepFailed(path, failure(INVALID_OUTPUT, message))
        return value
