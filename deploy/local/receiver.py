"""A minimal receiver of webhooks. The demo shows what a user's own server would get."""

import asyncio
from typing import Any, Final, Self

from aiohttp import web

from deploy.local.ports import HOST


class Receiver:
    """Accepts every POST to /outcomes on a port of the loopback interface, and queues its JSON body."""

    def __init__(self, port: int) -> None:
        self.url: Final = f"http://{HOST}:{port}/outcomes"
        self.events: Final[asyncio.Queue[dict[str, Any]]] = asyncio.Queue()
        self._port = port
        app = web.Application()
        app.router.add_post("/outcomes", self._receive)
        self._runner = web.AppRunner(app, access_log=None)

    async def __aenter__(self) -> Self:
        """Listen."""
        await self._runner.setup()
        await web.TCPSite(self._runner, HOST, self._port).start()
        return self

    async def __aexit__(self, *_: object) -> None:
        """Stop listening."""
        await self._runner.cleanup()

    async def _receive(self, request: web.Request) -> web.Response:
        self.events.put_nowait(await request.json())
        return web.Response(status=204)
