"""LLMModelsWorkflow: the models that a tenant has trained, with their versions and aliases.

    trainer ──update RegisterModel──▶ a new version, which "latest" names from then on
    gateway ──updates SetModelAlias, DeleteModelVersion──▶ an alias names another version, a version goes
    gateway, GPU worker, trainer ──query GetRecord──▶ all models

A tenant has at most MAX_MODELS, a model at most MAX_VERSIONS. Of more versions the oldest one without an alias goes,
and trainers remove its files from the store. A model goes with its last version. The registry keeps the highest number
of such models' versions, above which each new model begins: no version may get a number that another one had.
"""

from typing import Final

from temporalio import workflow
from temporalio.exceptions import ApplicationError

with workflow.unsafe.imports_passed_through():
    from jobs import names
    from jobs.inputs import one_input
    from jobs.model_rules import check_delete_version, check_set_alias
    from jobs.training import (
        ALIAS_PATTERN,
        LATEST,
        MAX_ALIASES,
        MAX_VERSIONS,
        MODEL_NAME_PATTERN,
        find_model,
        shown_model,
        why_no_room,
    )
    from llm_pb import internal_pb2, llm_pb2

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
        if version := self._registered(request):
            return internal_pb2.RegisterModelResponse(version=version)
        model = self._model(request.model)
        if model is None:
            model = self._registry.models.add(name=request.model, last_version=self._registry.removed_version)
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
        if self._registered(request):
            return
        if why := why_no_room(self._registry, request.model, request.alias, request.ByteSize()):
            raise ApplicationError(why, type=names.TOO_MANY_MODELS)

    def _registered(self, request: internal_pb2.RegisterModelRequest) -> int:
        """Return the version that the same pipeline has registered before: its answer was lost. 0 if it has not."""
        model, asked = self._model(request.model), request.version.version
        same = (
            known.version.version
            for known in (() if model is None else model.versions)
            if (known.version.pipeline_id, known.version.sha256) == (asked.pipeline_id, asked.sha256)
        )
        return next(same, 0)

    @workflow.update(name=names.UPDATE_SET_MODEL_ALIAS)
    @one_input
    async def set_alias(self, request: llm_pb2.SetModelAliasRequest | None = None) -> llm_pb2.TrainedModel:
        """Point an alias at a version, or remove it for version 0. Refused with a type of the errors of jobs.names."""
        asked, model = self._setting(request)
        self._updates += 1
        if asked.version:
            model.aliases[asked.alias] = asked.version
        else:
            model.aliases.pop(asked.alias, None)
        return shown_model(model)

    @set_alias.validator
    @one_input
    def _validate_set_alias(self, request: llm_pb2.SetModelAliasRequest | None = None) -> None:
        """Refuse what cannot be done, which spares the history its events."""
        self._setting(request)

    @workflow.update(name=names.UPDATE_DELETE_MODEL_VERSION)
    @one_input
    async def delete_version(self, request: llm_pb2.DeleteModelVersionRequest | None = None) -> llm_pb2.TrainedModel:
        """Remove a version that no alias but "latest" names, and the model with its last one.

        Refused with a type of the errors of jobs.names.
        """
        asked, model = self._deleting(request)
        self._updates += 1
        del model.versions[[one.version.version for one in model.versions].index(asked.version)]
        if model.versions:
            model.aliases[LATEST] = model.versions[-1].version.version
            return shown_model(model)
        model.aliases.clear()
        shown = shown_model(model)
        # Runs of earlier versions have left models without versions.
        if workflow.patched(names.PATCH_REMOVED_MODELS):
            for empty in [one for one in self._registry.models if not one.versions]:
                self._registry.removed_version = max(self._registry.removed_version, empty.last_version)
                self._registry.models.remove(empty)
        return shown

    @delete_version.validator
    @one_input
    def _validate_delete_version(self, request: llm_pb2.DeleteModelVersionRequest | None = None) -> None:
        """Refuse what cannot be done, which spares the history its events."""
        self._deleting(request)

    def _setting(
        self, request: llm_pb2.SetModelAliasRequest | None
    ) -> tuple[llm_pb2.SetModelAliasRequest, internal_pb2.RegisteredModel]:
        """Return the request and its model. Raises ApplicationError for what cannot be done."""
        if request is None or check_set_alias(request):
            raise ApplicationError("SetModelAlias takes one valid SetModelAliasRequest")
        model = self._known(request.model, request.version)
        if request.version and len({*model.aliases, LATEST, request.alias}) > MAX_ALIASES:
            raise ApplicationError(f"a model has at most {MAX_ALIASES} aliases", type=names.TOO_MANY_MODELS)
        return request, model

    def _deleting(
        self, request: llm_pb2.DeleteModelVersionRequest | None
    ) -> tuple[llm_pb2.DeleteModelVersionRequest, internal_pb2.RegisteredModel]:
        """Return the request and its model. Raises ApplicationError for what cannot be done."""
        if request is None or check_delete_version(request):
            raise ApplicationError("DeleteModelVersion takes one valid DeleteModelVersionRequest")
        model = self._known(request.model, request.version)
        named = sorted(alias for alias, version in model.aliases.items() if version == request.version)
        if other := [alias for alias in named if alias != LATEST]:
            message = f"{request.model}@{request.version} has the alias {other[0]}: move it, or remove it"
            raise ApplicationError(message, type=names.MODEL_VERSION_IN_USE)
        return request, model

    def _known(self, name: str, version: int) -> internal_pb2.RegisteredModel:
        """Return a model that has a version; any one for 0. Raises ApplicationError without one."""
        model = self._model(name)
        if model is None or not model.versions:
            raise ApplicationError(f"no model has been trained as {name}", type=names.MODEL_NOT_FOUND)
        if version and all(one.version.version != version for one in model.versions):
            raise ApplicationError(f"{name} has no version {version}, or no longer", type=names.MODEL_NOT_FOUND)
        return model

    @workflow.query(name=names.QUERY_GET_RECORD)
    def get_record(self) -> internal_pb2.ModelRegistry:
        """Return all models."""
        return self._registry

    def _model(self, name: str) -> internal_pb2.RegisteredModel | None:
        return find_model(self._registry, name)

    def _too_long(self) -> bool:
        most = self._registry.max_updates or _MAX_UPDATES
        return self._updates >= most or workflow.info().is_continue_as_new_suggested()
