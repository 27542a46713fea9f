"""The models that a tenant has trained: as ListModels shows them, and changes of them."""

from typing import Final

from temporalio.client import Client, WorkflowQueryFailedError, WorkflowUpdateFailedError
from temporalio.exceptions import ApplicationError

from jobs import names
from jobs.ids import models_workflow_id
from jobs.records import read_record
from jobs.training import find_model, shown_model, why_no_room
from llm_pb import internal_pb2, llm_pb2, pipeline_pb2
from runtime import audit
from runtime.shared_calls import SharedCalls
from runtime.temporal import RPC_TIMEOUT
from services.gateway.effects import Effects
from services.gateway.errors import temporal_unavailable, trained_model_refused

_REFUSALS: Final = (names.MODEL_NOT_FOUND, names.MODEL_VERSION_IN_USE, names.TOO_MANY_MODELS)
"""Types of the errors with which the registry refuses a change. It has others while it is continued, or while a gateway
of an earlier version runs it."""


class TrainedModels:
    """The registries of trained models, one for each tenant."""

    def __init__(self, client: Client, effects: Effects) -> None:
        self._client = client
        self._effects = effects
        self._calls = SharedCalls()

    async def all(self, tenant: str) -> list[llm_pb2.TrainedModel]:
        """Return the trained models of a tenant, by name. Raises ApiError UNAVAILABLE, RPCError, PayloadError."""
        models = [model for model in (await self._registry(tenant)).models if model.versions]
        return [shown_model(model) for model in sorted(models, key=lambda model: model.name)]

    async def require_room(self, tenant: str, spec: pipeline_pb2.TrainingSpec) -> None:
        """Raise ApiError FAILED_PRECONDITION if a training's model could not be registered now. Like all()."""
        if why := why_no_room(await self._registry(tenant), spec.model, spec.alias):
            raise trained_model_refused(names.TOO_MANY_MODELS, why)

    async def set_alias(self, tenant: str, request: llm_pb2.SetModelAliasRequest) -> llm_pb2.TrainedModel:
        """Point an alias at a version, or remove it. Raises ApiError, RPCError, AuditUnavailable."""
        audit.describe(alias=request.alias)
        return await self._change(tenant, names.UPDATE_SET_MODEL_ALIAS, request)

    async def delete_version(self, tenant: str, request: llm_pb2.DeleteModelVersionRequest) -> llm_pb2.TrainedModel:
        """Remove a version. Like set_alias()."""
        return await self._change(tenant, names.UPDATE_DELETE_MODEL_VERSION, request)

    async def _registry(self, tenant: str) -> internal_pb2.ModelRegistry:
        """Return the registry of a tenant, which nobody may change: calls of the same time share it."""
        id_ = models_workflow_id(tenant)
        try:
            return await self._calls.fresh(
                id_, lambda: read_record(self._client, id_, internal_pb2.ModelRegistry, RPC_TIMEOUT)
            )
        except WorkflowQueryFailedError as error:
            raise temporal_unavailable("the registry of trained models does not answer; call again") from error

    async def _change(
        self,
        tenant: str,
        update: str,
        request: llm_pb2.SetModelAliasRequest | llm_pb2.DeleteModelVersionRequest,
    ) -> llm_pb2.TrainedModel:
        audit.describe(model=f"{request.model}@{request.version}" if request.version else request.model)
        # Refused before the audit log records an effect, because nothing is changed.
        model = find_model(await self._registry(tenant), request.model)
        known = [] if model is None else [one.version.version for one in model.versions]
        if not known or request.version not in (0, *known):
            version = f"@{request.version}" if request.version else ""
            raise trained_model_refused(names.MODEL_NOT_FOUND, f"there is no trained model {request.model}{version}")
        try:
            changed: llm_pb2.TrainedModel = await self._effects.update(
                models_workflow_id(tenant), update, request, result_type=llm_pb2.TrainedModel
            )
        except WorkflowUpdateFailedError as error:
            cause = error.cause
            if not isinstance(cause, ApplicationError) or cause.type is None or cause.type not in _REFUSALS:
                raise temporal_unavailable("the registry of trained models does not answer; call again") from error
            raise trained_model_refused(cause.type, cause.message) from None
        return changed
