"""The heartbeat of RunLLMOnGPU is read in this version's form and in the next version's."""

import pytest

from jobs.heartbeat import from_details, to_details
from llm_pb import internal_pb2, llm_pb2
from payload_converter import data_converter

HEARTBEAT = internal_pb2.RunHeartbeat(
    progress=llm_pb2.JobProgress(output_tokens=7, stage="decode"),
    metadata=llm_pb2.ResultMetadata(attempts=2),
    attempts=[llm_pb2.JobAttempt(attempt=1, worker="first"), llm_pb2.JobAttempt(attempt=2, worker="second")],
    provider_response=internal_pb2.ProviderResponse(response_id="resp_1", sequence_number=4, output_bytes=9),
)


@pytest.mark.parametrize("details", [to_details(HEARTBEAT), (HEARTBEAT,)], ids=["fields", "message"])
async def test_a_heartbeat_is_read_back(details: tuple[object, ...]) -> None:
    payloads = await data_converter.encode(details)
    assert from_details(await data_converter.decode(payloads)) == HEARTBEAT


async def test_a_heartbeat_without_attempts_tells_of_the_one_that_sent_it() -> None:
    """As those of version 0.1.0, and those of a first attempt."""
    metadata = llm_pb2.ResultMetadata(attempts=1, worker="first")
    payloads = await data_converter.encode((HEARTBEAT.progress, metadata))
    (attempt,) = from_details(await data_converter.decode(payloads)).attempts
    assert (attempt.attempt, attempt.worker) == (1, "first")


@pytest.mark.parametrize("details", [(), ("decode", 7), (None,)])
async def test_a_heartbeat_of_somebody_else_says_nothing(details: tuple[object, ...]) -> None:
    payloads = await data_converter.encode(details)
    assert from_details(await data_converter.decode(payloads)) == internal_pb2.RunHeartbeat()
