"""No request blocks a gateway: whatever its bytes are, the gateway serves other requests meanwhile."""

import contextlib
import os
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf.message import DecodeError, Message
from hypothesis import given, settings
from hypothesis import strategies as st

from deploy.local.process import Process
from deploy.local.stack import Stack
from llm_pb import llm_pb2
from services.gateway.wire import count_fields
from tests.support.bad_requests import REQUESTS, send
from tests.support.hostile_requests import BODIES, length_delimited, varint
from tests.support.jobs import details_of, new_job

ALLOWED = 0.05
"""Maximum seconds for which one request may block the event loop, of a processor that is not shared with others."""
REFERENCE = 0.02
"""Seconds that such a processor takes for what slowness() does."""


@pytest.fixture(scope="module")
async def channel(stack: Stack) -> AsyncIterator[grpc.aio.Channel]:
    async with grpc.aio.insecure_channel(stack.address("gateway")) as channel:
        yield channel


def loop_seconds(process: Process) -> float:
    """Return the processor time of the process's main thread, which runs its event loop."""
    pid = process.pid
    return int(Path(f"/proc/{pid}/task/{pid}/schedstat").read_text().split()[0]) / 1e9


def slowness() -> float:
    """Return how many times as long as alone a processor takes now: those of one core, or of one host, share it."""
    began = time.process_time()
    total = 0
    for number in range(200_000):
        total += number * number
    return max((time.process_time() - began) / REFERENCE, 1)


@pytest.mark.skipif(not os.path.exists("/proc/self/schedstat"), reason="the kernel has no schedstat")
@pytest.mark.parametrize("what", BODIES)
async def test_no_request_holds_the_event_loop(stack: Stack, channel: grpc.aio.Channel, what: str) -> None:
    """A hostile request is refused, as a whole or with each invalid field, within 50 ms of the loop's processor time.

    Processor time is measured, as that of a processor alone, because others use the machine, too. The least of three
    measurements counts because the gateway serves other calls as well.
    """
    gateway = stack.processes["gateway"]
    rpc, data = BODIES[what]
    used = []
    for _ in range(3):
        before = loop_seconds(gateway)
        error = await send(channel, rpc, data)
        used.append((loop_seconds(gateway) - before) / slowness())
        assert error is not None or what == "a schema of many numbers"
        if error is not None:
            assert error.code() == grpc.StatusCode.INVALID_ARGUMENT, error
            assert details_of(error)["BadRequest"].field_violations
        if used[-1] < ALLOWED:
            return
    raise AssertionError(used)


@pytest.mark.parametrize("kind", REQUESTS.values(), ids=REQUESTS)
@settings(max_examples=100)
@given(data=st.data())
def test_fields_are_counted_as_protobuf_reads_them(kind: type[Message], data: Any) -> None:
    """Bytes that cannot be counted cannot be parsed, and the count includes every field that protobuf parses."""
    body = data.draw(st.binary(max_size=40) | wire_fields)
    try:
        count = count_fields(body, kind, 1000)
    except DecodeError:
        with pytest.raises(DecodeError):
            kind.FromString(body)
        return
    with contextlib.suppress(DecodeError):
        assert fields_of(kind.FromString(body)) <= count


wire_values = st.deferred(lambda: wire_fields | st.binary(max_size=4))
wire_fields = st.lists(
    st.builds(length_delimited, st.integers(1, 16), wire_values)
    | st.builds(lambda tag, value: varint(tag) + varint(value), st.integers(8, 127), st.integers(0, 2**35))
    | st.just(b"\x4b")
    | st.just(b"\x4c"),
    max_size=4,
).map(b"".join)
"""Bytes that are nearly messages: fields with small numbers, nested messages, groups."""


def fields_of(message: Message) -> int:
    """Return the number of values in a message, including those of its nested messages."""
    count = 0
    for field, value in message.ListFields():
        items = value if field.is_repeated else [value]
        count += sum(1 + fields_of(item) if isinstance(item, Message) else 1 for item in items)
    return count


async def test_a_request_may_have_all_that_the_rules_allow(channel: grpc.aio.Channel) -> None:
    """The bound on fields adds no limit to the rules: 1024 messages and 1000 choices are accepted."""
    job = new_job(
        model="structured",
        messages=[llm_pb2.ChatMessage(role=llm_pb2.ROLE_USER, content="x")] * 1024,
        params={"stop": ["x"] * 16, "choice": {"options": ["yes"] * 1000}, "max_tokens": 1},
        timeouts={"queue": {"nanos": 1_000_000}},
    )
    assert await send(channel, "Submit", llm_pb2.SubmitRequest(job=job).SerializeToString()) is None


@pytest.mark.parametrize("rpc", [rpc for rpc in REQUESTS if rpc != "Submit"])
async def test_a_request_of_any_other_method_is_at_most_64_kib(channel: grpc.aio.Channel, rpc: str) -> None:
    """All bytes count, those of unknown fields as well. A schedule may have 256 KiB, the data of a file 1 MiB."""
    most = {
        **dict.fromkeys(("CreateSchedule", "UpdateSchedule"), 256 * 1024 + 512),
        "UploadFile": 1024 * 1024 + 64 * 1024,
        "SubmitPipeline": 2 * 64 * 1024,
    }.get(rpc, 64 * 1024)
    error = await send(channel, rpc, length_delimited(999, b"x" * most))
    assert error is not None
    assert (error.code(), error.details()) == (
        grpc.StatusCode.INVALID_ARGUMENT,
        f"the request is {most + 2 + len(varint(most))} bytes; at most {most} fit",
    )
