"""What AsyncClient calls about models."""

from collections.abc import Sequence

from durable_llm._retrying_stub import RetryingStub
from llm_pb import llm_pb2


class ModelCalls:
    """The calls, for a class that has a stub."""

    _stub: RetryingStub

    async def models(self) -> Sequence[llm_pb2.ModelInfo]:
        """Return the models that a job may name. Raises ApiError."""
        response: llm_pb2.ListModelsResponse = await self._stub.unary("ListModels", llm_pb2.ListModelsRequest())
        return response.models

    async def trained_models(self) -> Sequence[llm_pb2.TrainedModel]:
        """Return the models that the caller's tenant has trained, with their versions. Raises ApiError."""
        response: llm_pb2.ListModelsResponse = await self._stub.unary("ListModels", llm_pb2.ListModelsRequest())
        return response.trained

    async def set_model_alias(self, model: str, alias: str, version: int) -> llm_pb2.TrainedModel:
        """Point an alias of a trained model at a version, or remove it for version 0; return the model.

        Raises ApiError: ModelNotFound, TooManyModels, MissingScope without `models:train`.
        """
        request = llm_pb2.SetModelAliasRequest(model=model, alias=alias, version=version)
        response: llm_pb2.SetModelAliasResponse = await self._stub.unary("SetModelAlias", request)
        return response.model

    async def delete_model_version(self, model: str, version: int) -> llm_pb2.TrainedModel:
        """Remove a version of a trained model for good; return the model.

        Raises ApiError: ModelNotFound, ModelVersionInUse while an alias names it, MissingScope without `models:train`.
        """
        request = llm_pb2.DeleteModelVersionRequest(model=model, version=version)
        response: llm_pb2.DeleteModelVersionResponse = await self._stub.unary("DeleteModelVersion", request)
        return response.model
