"""LLMModelsWorkflow: the models that a tenant has trained, with their versions and aliases.

    trainer ──update RegisterModel──▶ a new version, which "latest" names from then on
    gateway, GPU worker, trainer ──query GetRecord──▶ all models

A tenant has at most MAX_MODELS, a model at most MAX_VERSIONS. Of more versions the oldest one without an alias goes,
and trainers remove its files from the store.
"""

from typing import Final

from temporalio import workflow
from temporalio.exceptions import ApplicationError

with workflow.unsafe.imports_passed_through():
    from jobs import names
    from jobs.inputs import one_input
    from jobs.training import ALIAS_PATTERN, LATEST, MODEL_NAME_PATTERN
    from llm_pb import internal_pb2

MAX_MODELS: Final = 100
MAX_VERSIONS: Final = 20
MAX_ALIASES: Final = 10
"""Maximum number of aliases of a model. It is smaller than MAX_VERSIONS, so that some version can always go."""
_MAX_BYTES: Final = 1024 * 1024
"""Maximum size of the registry. Temporal takes no input of a run and no answer to a query of more than 2 MiB."""
_MAX_UPDATES: Final = 1000


@workflow.defn(name=names.MODELS_WORKFLOW_TYPE)
class LLMModelsWorkflow:
    """Runs for ever, in one run after another."""

    @workflow.init
    @one_input
    def __init__(self, registry: internal_pb2.ModelRegistry | None = None) -> None:
        self._registry = internal_pb2.ModelRegistry()
        if registry is not None:
            self._registry.CopyFrom(registry)
        self._updates = 0

    @workflow.run
    @one_input
    async def run(self, registry: internal_pb2.ModelRegistry | None = None) -> None:
        """Continue in a new run before Temporal accepts no more updates in this one."""
        await workflow.wait_condition(self._too_long)
        await workflow.wait_condition(workflow.all_handlers_finished)
        workflow.continue_as_new(self._registry)

    @workflow.update(name=names.UPDATE_REGISTER_MODEL)
    @one_input
    async def register(
        self, request: internal_pb2.RegisterModelRequest | None = None
    ) -> internal_pb2.RegisterModelResponse:
        """Register a version and return its number. A repeat of the same pipeline changes nothing."""
        if request is None:
            raise ApplicationError("RegisterModel takes one RegisterModelRequest")
        self._updates += 1
        model = self._model(request.model)
        if model is None:
            model = self._registry.models.add(name=request.model)
        asked = request.version.version
        for known in model.versions:
            if (known.version.pipeline_id, known.version.sha256) == (asked.pipeline_id, asked.sha256):
                return internal_pb2.RegisterModelResponse(version=known.version.version)
        model.last_version += 1
        added = model.versions.add()
        added.CopyFrom(request.version)
        added.version.version = model.last_version
        added.version.create_time.FromDatetime(workflow.now())
        for alias in {LATEST, request.alias} - {""}:
            model.aliases[alias] = model.last_version
        while len(model.versions) > MAX_VERSIONS:
            named = {*model.aliases.values()}
            del model.versions[next(at for at, one in enumerate(model.versions) if one.version.version not in named)]
        return internal_pb2.RegisterModelResponse(version=model.last_version)

    @register.validator
    @one_input
    def _validate_register(self, request: internal_pb2.RegisterModelRequest | None = None) -> None:
        """Refuse what cannot be registered, which spares the history its events."""
        if request is None:
            raise ApplicationError("RegisterModel takes one RegisterModelRequest")
        bad_alias = request.alias and ALIAS_PATTERN.fullmatch(request.alias) is None
        if MODEL_NAME_PATTERN.fullmatch(request.model) is None or bad_alias:
            raise ApplicationError("the model or its alias has a bad name")
        model = self._model(request.model)
        if model is None and len(self._registry.models) >= MAX_MODELS:
            raise ApplicationError(f"a tenant has at most {MAX_MODELS} models", type=names.TOO_MANY_MODELS)
        grows = model is None or len(model.versions) < MAX_VERSIONS
        if grows and self._registry.ByteSize() + request.ByteSize() > _MAX_BYTES:
            message = "the models of the tenant have too many versions"
            raise ApplicationError(message, type=names.TOO_MANY_MODELS)
        if model is not None and len({*model.aliases, LATEST, request.alias} - {""}) > MAX_ALIASES:
            raise ApplicationError(f"a model has at most {MAX_ALIASES} aliases", type=names.TOO_MANY_MODELS)

    @workflow.query(name=names.QUERY_GET_RECORD)
    def get_record(self) -> internal_pb2.ModelRegistry:
        """Return all models."""
        return self._registry

    def _model(self, name: str) -> internal_pb2.RegisteredModel | None:
        return next((model for model in self._registry.models if model.name == name), None)

    def _too_long(self) -> bool:
        most = self._registry.max_updates or _MAX_UPDATES
        return self._updates >= most or workflow.info().is_continue_as_new_suggested()
