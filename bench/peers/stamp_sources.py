"""The sources with which the suite's live feed is compared, in a process of their own like the suite's worker.

    python -m bench.peers.stamp_sources TEMPORAL_ADDRESS NATS_ADDRESS

It prints the port of its gRPC server, and then generates stamps on request:

- as a Temporal worker: the activity publishes them to a Workflow Stream;
- over gRPC, `Stream`: a stream of bytes without a message type; the request is "COUNT PER_SECOND";
- over gRPC, `Broadcast`: an endless stream whose readers all get the same stamps; the request is PER_SECOND;
- over NATS: published to the reply subject of the request, which is "COUNT PER_SECOND".
"""

import asyncio
import sys
from collections.abc import AsyncIterator
from datetime import timedelta
from typing import Any, Final

import grpc
import nats
from nats.aio.msg import Msg
from temporalio import activity
from temporalio.client import Client
from temporalio.contrib.workflow_streams import WorkflowStreamClient
from temporalio.worker import Worker

from bench.peers.streaming_workflow import MAKE_TOKENS, QUEUE, TOPIC, Asked, StreamingWorkflow
from bench.support.stamps import paced
from runtime.grpc_server import Limits, channel_options

SERVICE: Final = "bench.Stamps"
SUBJECT: Final = "bench.support.stamps"
MESSAGE_BYTES: Final = 4 * 1024 * 1024


@activity.defn(name=MAKE_TOKENS)
async def make_tokens(asked: Asked) -> None:
    """Publish each token as it is generated, like Temporal's own sample for LLMs."""
    client = WorkflowStreamClient.from_within_activity(
        batch_interval=timedelta(seconds=asked.setup.batch_interval), max_batch_size=asked.setup.max_batch_size
    )
    async with client:
        tokens = client.topic(TOPIC, type=str)
        async for text in paced(asked.tokens, asked.per_second):
            tokens.publish(text)


async def stream_stamps(request: bytes, context: grpc.aio.ServicerContext[Any, Any]) -> AsyncIterator[bytes]:
    """Yield the stamps that a gRPC call requests."""
    count, per_second = request.split()
    async for text in paced(int(count), float(per_second)):
        yield text.encode()


class Broadcast:
    """Streams that all get the same stamps."""

    def __init__(self) -> None:
        self._latest = ""
        self._changed = asyncio.Event()
        self._making: asyncio.Task[None] | None = None

    async def stream(self, request: bytes, context: grpc.aio.ServicerContext[Any, Any]) -> AsyncIterator[bytes]:
        """Yield the stamps of a gRPC call. The first call sets the pace of all."""
        self._making = self._making or asyncio.create_task(self._make(float(request)))
        while True:
            await self._changed.wait()
            yield self._latest.encode()

    async def _make(self, per_second: float) -> None:
        async for text in paced(sys.maxsize, per_second):
            self._latest = text
            changed, self._changed = self._changed, asyncio.Event()
            changed.set()


async def main(temporal: str, broker: str) -> None:
    """Serve until killed."""
    server = grpc.aio.server(options=channel_options(Limits(MESSAGE_BYTES)))
    handler: grpc.RpcMethodHandler[bytes, bytes] = grpc.unary_stream_rpc_method_handler(stream_stamps)
    shared: grpc.RpcMethodHandler[bytes, bytes] = grpc.unary_stream_rpc_method_handler(Broadcast().stream)
    handlers = {"Stream": handler, "Broadcast": shared}
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, handlers),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()

    feed = await nats.connect(broker)
    publishing: set[asyncio.Task[None]] = set()

    async def publish(message: Msg) -> None:
        count, per_second = message.data.split()
        async for text in paced(int(count), float(per_second)):
            await feed.publish(message.reply, text.encode())

    async def asked(message: Msg) -> None:
        task = asyncio.create_task(publish(message))
        publishing.add(task)
        task.add_done_callback(publishing.discard)

    await feed.subscribe(SUBJECT, cb=asked)
    await feed.flush()

    client = await Client.connect(temporal)
    async with Worker(client, task_queue=QUEUE, workflows=[StreamingWorkflow], activities=[make_tokens]):
        print(port, flush=True)
        await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
