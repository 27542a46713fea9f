"""The page of models, their queues and their workers."""

import asyncio

from starlette.requests import Request
from starlette.responses import Response

from llm_pb import llm_pb2
from services.http.console.caller import caller_of
from services.http.console.optional import ask, quota_of
from services.http.console.pages import Pages
from services.http.front import Front


class Models:
    """The handler."""

    def __init__(self, front: Front, pages: Pages) -> None:
        self._front = front
        self._pages = pages

    async def show(self, request: Request) -> Response:
        """Show the models, how many jobs wait for each, the caller's quotas and, to whom may see them, the workers."""
        calls = self._front.gateway.in_name_of(caller_of(request))
        listed, quota, workers = await asyncio.gather(
            calls.call("ListModels", llm_pb2.ListModelsRequest()),
            quota_of(calls),
            ask(calls, "ListWorkers", llm_pb2.ListWorkersRequest()),
        )
        return self._pages.render(request, "models.html", models=listed.models, quota=quota, workers=workers)
