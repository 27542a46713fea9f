"""The models that a tenant has trained, as ListModels shows them."""

from temporalio.client import Client, WorkflowQueryFailedError

from jobs.ids import models_workflow_id
from jobs.records import read_record
from llm_pb import internal_pb2, llm_pb2
from runtime.temporal import RPC_TIMEOUT
from services.gateway.errors import temporal_unavailable


async def trained_models(client: Client, tenant: str) -> list[llm_pb2.TrainedModel]:
    """Return the trained models of a tenant, by name. Raises ApiError UNAVAILABLE, RPCError, PayloadError."""
    try:
        registry = await read_record(client, models_workflow_id(tenant), internal_pb2.ModelRegistry, RPC_TIMEOUT)
    except WorkflowQueryFailedError as error:
        raise temporal_unavailable("the registry of trained models does not answer; call again") from error
    return [
        llm_pb2.TrainedModel(
            name=model.name,
            versions=[one.version for one in reversed(model.versions)],
            aliases=model.aliases,
        )
        for model in sorted(registry.models, key=lambda model: model.name)
    ]
