"""Trained models without a training: their versions are registered as a trainer does it."""

import itertools
from typing import Any, Final

from temporalio.client import Client, WithStartWorkflowOperation
from temporalio.common import WorkflowIDConflictPolicy

from jobs import names
from jobs.ids import models_workflow_id
from llm_pb import internal_pb2, llm_pb2

_numbers: Final = itertools.count(1)


async def register(temporal: Client, model: str, alias: str = "") -> int:
    """Register a new version of a model of nobody's tenant, and return its number. It has no files."""
    number = next(_numbers)
    version = llm_pb2.ModelVersion(
        base_model="docstrings", pipeline_id=f"llmpipe-a-{number}", loss=1.25, base_loss=2.5, size_bytes=2048
    )
    request = internal_pb2.RegisterModelRequest(
        model=model, alias=alias, version=internal_pb2.RegisteredVersion(version=version)
    )
    start: WithStartWorkflowOperation[Any, Any] = WithStartWorkflowOperation(
        names.MODELS_WORKFLOW_TYPE,
        internal_pb2.ModelRegistry(),
        id=models_workflow_id(""),
        task_queue=names.WORKFLOW_QUEUE,
        id_conflict_policy=WorkflowIDConflictPolicy.USE_EXISTING,
    )
    registered: internal_pb2.RegisterModelResponse = await temporal.execute_update_with_start_workflow(
        names.UPDATE_REGISTER_MODEL,
        request,
        start_workflow_operation=start,
        result_type=internal_pb2.RegisterModelResponse,
    )
    return registered.version
