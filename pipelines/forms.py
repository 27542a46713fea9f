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


def parsed(path: str, result: llm_pb2.JobResult, text: str, schema: Mapping[str, Any]) -> Any:
    """Return the output `text` of the job of a step. Raises StepFailed, INVALID_OUTPUT, for one of another form."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        wrong = f"the output is no JSON: {error}"
        if result.finish_reason == llm_pb2.FINISH_REASON_LENGTH:
            wrong = f"the output was cut after {result.metadata.output_tokens} tokens, so its JSON is incomplete"
        raise StepFailed(path, failure(INVALID_OUTPUT, wrong)) from None
    if (misfits := _refused(value, schema)) is not None:
        message = f"the output does not keep the schema, as a provider may not: {misfits}"
        raise StepFailed(path, failure(INVALID_OUTPUT, message))
    return value


def is_usable(result: llm_pb2.JobResult, schema: Mapping[str, Any]) -> bool:
    """Return whether parsed() returns what a job has made in an earlier run. A job of which it does not runs again."""
    try:
        value = json.loads(result.output)
    except (ValueError, RecursionError):
        return False
    return _refused(value, schema) is None


def _refused(value: Any, schema: Mapping[str, Any]) -> str | None:
    """Return what the schema does not allow. The steps that an earlier version has run are not checked."""
    wrong = misfit(value, dict(schema))
    return wrong if wrong is not None and workflow.patched(names.PATCH_FORMS) else None
