"""The page of models, their queues and their workers."""

import asyncio
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

from starlette.requests import Request
from starlette.responses import Response

from jobs.classes import is_background
from llm_pb import common_pb2, llm_pb2
from services.http.console.caller import caller_of
from services.http.console.optional import ask, quota_of
from services.http.console.pages import Pages
from services.http.front import Front


class ClassRow(NamedTuple):
    """A class of jobs, at all models together."""

    job_class: "common_pb2.JobClass.ValueType"
    weight: float
    share: float
    """Its share of the turns while the other class of its queue waits, too."""
    backlog: int


class Models:
    """The handler."""

    def __init__(self, front: Front, pages: Pages) -> None:
        self._front = front
        self._pages = pages

    async def show(self, request: Request) -> Response:
        """Show the models and classes with their queues, the caller's quotas and, to callers with the scope, the
        workers."""
        calls = self._front.gateway.in_name_of(caller_of(request))
        listed, quota, workers = await asyncio.gather(
            calls.call("ListModels", llm_pb2.ListModelsRequest()),
            quota_of(calls),
            ask(calls, "ListWorkers", llm_pb2.ListWorkersRequest()),
        )
        return self._pages.render(
            request,
            "models.html",
            models=listed.models,
            classes=_class_rows(listed.models),
            quota=quota,
            workers=workers,
        )


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
