"""The floor of bench.http_front: a server of a few lines that streams stamps as server-sent events.

    python -m bench.peers.bare_sse PER_SECOND

It has the libraries of the suite's HTTP front, Starlette and uvicorn, and nothing behind it. It answers POST
/v1/completions, reads `max_tokens`, and prints its port.
"""

import asyncio
import json
import socket
import sys
from collections.abc import AsyncIterator

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import StreamingResponse
from starlette.routing import Route

from bench.support.stamps import paced


async def main(per_second: float) -> None:
    """Serve until killed."""

    async def completions(request: Request) -> StreamingResponse:
        tokens: int = (await request.json())["max_tokens"]

        async def events() -> AsyncIterator[bytes]:
            async for text in paced(tokens, per_second):
                yield f"data: {json.dumps({'choices': [{'text': text}]})}\n\n".encode()

        return StreamingResponse(events(), media_type="text/event-stream")

    app = Starlette(routes=[Route("/v1/completions", completions, methods=["POST"])])
    with socket.create_server(("127.0.0.1", 0)) as listener:
        # asyncio does it only for sockets that name their protocol. Otherwise the first event waits 40 ms for an ACK.
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        print(listener.getsockname()[1], flush=True)
        await uvicorn.Server(uvicorn.Config(app, log_level="error")).serve([listener])


if __name__ == "__main__":
    asyncio.run(main(float(sys.argv[1])))
