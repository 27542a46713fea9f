"""The upstream of bench.three_steps: chat completions of OpenAI's API, streamed or whole, and who asked for what when.

Its answer is a fixed text after a delay, so that what is measured is the program around it.
"""

import asyncio
import json
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, Final

from aiohttp import web

_TEXT: Final = "A text of seven words or so."
_USAGE: Final = {"prompt_tokens": 8, "completion_tokens": 8, "total_tokens": 16}


@dataclass
class Asked:
    """One request. Times are of time.monotonic()."""

    run: str
    step: str
    began: float
    ended: float | None = None
    """When its answer was written; None before that."""


@dataclass
class Upstream:
    """A running upstream."""

    url: str = ""
    """The base URL, "/v1" included."""
    delay: float = 0
    """Seconds until an answer."""
    asked: list[Asked] = field(default_factory=list)
    _changed: asyncio.Event = field(default_factory=asyncio.Event)

    def of(self, run: str) -> list[Asked]:
        """Return the requests of a run, in the order in which they began."""
        return [one for one in self.asked if one.run == run]

    async def until_asked(self, run: str, count: int) -> Asked:
        """Wait until a run has asked so often, and return the last of these requests."""
        while len(found := self.of(run)) < count:
            self._changed.clear()
            await self._changed.wait()
        return found[count - 1]

    async def answer(self, request: web.Request) -> web.Response:
        """Answer a chat completion."""
        body = await request.json()
        content = body["messages"][-1]["content"]
        words = content if isinstance(content, str) else content[0]["text"]
        run, step, *_ = words.split()
        one = Asked(run, step, time.monotonic())
        self.asked.append(one)
        self._changed.set()
        await asyncio.sleep(self.delay)
        one.ended = time.monotonic()
        return _stream() if body.get("stream") else _whole()


def _stream() -> web.Response:
    chunks = (
        {"choices": [{"index": 0, "delta": {"role": "assistant", "content": _TEXT}, "finish_reason": None}]},
        {"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]},
        {"choices": [], "usage": _USAGE},
    )
    lines = [f"data: {json.dumps({**_object('chat.completion.chunk'), **chunk})}\n\n" for chunk in chunks]
    return web.Response(text="".join([*lines, "data: [DONE]\n\n"]), content_type="text/event-stream")


def _whole() -> web.Response:
    message = {"role": "assistant", "content": _TEXT}
    choices = [{"index": 0, "message": message, "finish_reason": "stop"}]
    return web.json_response({**_object("chat.completion"), "choices": choices, "usage": _USAGE})


def _object(kind: str) -> dict[str, Any]:
    return {"id": "chatcmpl-1", "object": kind, "created": 1, "model": "docstrings"}


@asynccontextmanager
async def running_upstream() -> AsyncIterator[Upstream]:
    """Run an upstream in this process while the context is open."""
    upstream = Upstream()

    async def models(_: web.Request) -> web.Response:
        return web.json_response({"object": "list", "data": []})

    app = web.Application()
    app.router.add_post("/v1/chat/completions", upstream.answer)
    app.router.add_get("/v1/models", models)
    runner = web.AppRunner(app, shutdown_timeout=0.1)
    await runner.setup()
    try:
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        host, port, *_ = runner.addresses[0]
        upstream.url = f"http://{host}:{port}/v1"
        yield upstream
    finally:
        await runner.cleanup()
