"""What the suite's live feed is compared with, in a process of its own, as the suite's worker is in one.

    python -m bench.peers.stamp_sources TEMPORAL_ADDRESS NATS_ADDRESS

It prints the port of its gRPC server, and then makes stamps for whoever asks:

- as a Temporal worker: the activity publishes to a Workflow Stream;
- over gRPC: a stream of bytes without any message type, the request being "COUNT PER_SECOND"; and one without end
  whose stamps, PER_SECOND being the request, all who read it get at the same time;
- over NATS: the same, published to the subject to which the request asks to reply.
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
    """Publish each token as it is made, the way Temporal's own sample for LLMs does."""
    client = WorkflowStreamClient.from_within_activity(
        batch_interval=timedelta(seconds=asked.setup.batch_interval), max_batch_size=asked.setup.max_batch_size
    )
    async with client:
        tokens = client.topic(TOPIC, type=str)
        async for text in paced(asked.tokens, asked.per_second):
            tokens.publish(text)


async def stream_stamps(request: bytes, context: grpc.aio.ServicerContext[Any, Any]) -> AsyncIterator[bytes]:
    """Answer a gRPC call."""
    count, per_second = request.split()
    async for text in paced(int(count), float(per_second)):
        yield text.encode()


class Broadcast:
    """The streams that all get the same stamps."""

    def __init__(self) -> None:
        self._latest = ""
        self._changed = asyncio.Event()
        self._making: asyncio.Task[None] | None = None

    async def stream(self, request: bytes, context: grpc.aio.ServicerContext[Any, Any]) -> AsyncIterator[bytes]:
        """Answer a gRPC call; the first one's pace is everybody's."""
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
