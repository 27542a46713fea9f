"""Changes of the registry of trained models: see services.gateway.models.trained."""

from typing import Any

import pytest
from google.rpc import code_pb2
from temporalio.client import WorkflowUpdateFailedError
from temporalio.exceptions import ApplicationError

from jobs import names
from llm_pb import internal_pb2, llm_pb2
from services.gateway.errors import ApiError
from services.gateway.models.trained import TrainedModels


class Registry:
    """A registry with one model, which refuses every change, with the client and the effects that lead to it."""

    def __init__(self, error_type: str) -> None:
        self.error_type = error_type

    def get_workflow_handle(self, _: str) -> "Registry":
        return self

    async def query(self, *_: Any, **__: Any) -> internal_pb2.ModelRegistry:
        version = internal_pb2.RegisteredVersion(version=llm_pb2.ModelVersion(version=1))
        model = internal_pb2.RegisteredModel(name="poet", versions=[version])
        return internal_pb2.ModelRegistry(models=[model])

    async def update(self, *_: Any, **__: Any) -> None:
        raise WorkflowUpdateFailedError(ApplicationError("scripted", type=self.error_type))


@pytest.mark.parametrize(
    ("error_type", "code"),
    [
        (names.MODEL_NOT_FOUND, code_pb2.NOT_FOUND),
        (names.TOO_MANY_MODELS, code_pb2.FAILED_PRECONDITION),
        # A worker of an earlier version has no such handler; the run of the registry has ended meanwhile.
        ("RuntimeError", code_pb2.UNAVAILABLE),
        ("AcceptedUpdateCompletedWorkflow", code_pb2.UNAVAILABLE),
    ],
)
async def test_only_the_registry_itself_refuses_a_change(error_type: str, code: int) -> None:
    """Whatever else ends its update is worth another call."""
    registry: Any = Registry(error_type)
    request = llm_pb2.SetModelAliasRequest(model="poet", alias="best", version=1)
    with pytest.raises(ApiError) as refused:
        await TrainedModels(registry, registry).set_alias("acme", request)
    assert refused.value.status.code == code
