"""Streams of server-sent events, without a server."""

import asyncio
from collections.abc import AsyncGenerator, MutableMapping
from datetime import timedelta
from typing import Any

import pytest
from opentelemetry.metrics import NoOpMeter

from llm_pb import pipeline_pb2
from services.http.events import EventStream, event
from services.http.front import Front
from services.http.gateway import Gateway
from services.http.metrics import HttpMetrics
from services.http.rest.pipeline_streams import _as_event
from services.http.settings import HttpSettings


async def test_a_comment_that_cannot_be_sent_ends_the_stream_with_its_error() -> None:
    """The stream is closed, and its place is free."""
    closed = asyncio.Event()

    async def events() -> AsyncGenerator[bytes, None]:
        try:
            yield event({})
            await asyncio.Event().wait()
        finally:
            closed.set()

    async def receive() -> MutableMapping[str, Any]:
        return await asyncio.get_running_loop().create_future()

    async def send(message: MutableMapping[str, Any]) -> None:
        if message.get("body", b"").startswith(b": keep-alive"):
            raise ConnectionResetError("gone")

    settings = HttpSettings(stream_keepalive=timedelta(milliseconds=10))
    front = Front(settings, Gateway.__new__(Gateway), HttpMetrics(NoOpMeter("test")))
    async with asyncio.timeout(10):
        with pytest.raises(ConnectionResetError):
            await EventStream(events(), front)({"type": "http"}, receive, send)
    assert closed.is_set()
    assert front.streams == 0


def test_a_message_of_a_pipeline_that_takes_steps_back_is_an_event() -> None:
    """A comment has no id with which a client would come back."""
    sent = _as_event(pipeline_pb2.StreamPipelineResponse(rewind=True, cursor="c"))
    assert b"event: update" in sent
    assert b'"rewind":true' in sent.replace(b" ", b"")
