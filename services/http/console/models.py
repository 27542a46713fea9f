"""The page of models, their queues and their workers, and what people do to trained models there."""

import asyncio
from collections import Counter
from collections.abc import Sequence
from http import HTTPStatus
from typing import NamedTuple

from starlette.requests import Request
from starlette.responses import Response

from durable_llm.errors import Violation
from jobs.classes import is_background
from llm_pb import common_pb2, llm_pb2
from services.http.console.forms import read_form
from services.http.console.item_page import ItemPage, id_of
from services.http.console.optional import ask, quota_of
from services.http.failures import bad_request


class ClassRow(NamedTuple):
    """A class of jobs, at all models together."""

    job_class: "common_pb2.JobClass.ValueType"
    weight: float
    share: float
    """Its share of the turns while the other class of its queue waits, too."""
    backlog: int


class Models(ItemPage):
    """The handlers."""

    place = "/console/models"

    async def set_alias(self, request: Request) -> Response:
        """Point an alias of a trained model at a version. An empty version removes the alias."""
        form = await read_form(request, self._front.settings, "alias", "version")
        message = llm_pb2.SetModelAliasRequest(
            model=id_of(request), alias=form.get("alias", "").strip(), version=_number(form.get("version") or "0")
        )
        return await self._do(request, "SetModelAlias", message, gone=True)

    async def delete_version(self, request: Request) -> Response:
        """Remove a version of a trained model."""
        form = await read_form(request, self._front.settings, "version")
        message = llm_pb2.DeleteModelVersionRequest(model=id_of(request), version=_number(form.get("version", "")))
        return await self._do(request, "DeleteModelVersion", message, gone=True)

    async def _show(self, request: Request, refused: str = "", status: HTTPStatus = HTTPStatus.OK) -> Response:
        """Show the models and classes with their queues, trained models, the caller's quotas and, to callers with the
        scope, the workers."""
        calls = self._calls(request)
        listed, quota, workers = await asyncio.gather(
            calls.call("ListModels", llm_pb2.ListModelsRequest()),
            quota_of(calls),
            ask(calls, "ListWorkers", llm_pb2.ListWorkersRequest()),
        )
        return self._pages.render(
            request,
            "models.html",
            status,
            refused=refused,
            trained=listed.trained,
            models=listed.models,
            classes=_class_rows(listed.models),
            quota=quota,
            workers=workers,
        )


def _number(text: str) -> int:
    """Return the number of a version. Raises Failure, 400, for another text."""
    if not (text.isascii() and text.isdigit() and len(text) < 10):
        raise bad_request(Violation("version", "must be the number of a version"))
    return int(text)


def _class_rows(models: Sequence[llm_pb2.ModelInfo]) -> Sequence[ClassRow]:
    """Return the classes, with the weights that all models have; none where a gateway of an earlier version answers."""
    weights = {one.job_class: one.weight for model in models for one in model.classes if one.weight > 0}
    waiting: Counter[int] = Counter()
    for model in models:
        waiting.update({one.job_class: one.backlog for one in model.classes})
    return [
        ClassRow(
            job_class,
            weight,
            weight / sum(other for one, other in weights.items() if is_background(one) == is_background(job_class)),
            waiting[job_class],
        )
        for job_class, weight in weights.items()
    ]
