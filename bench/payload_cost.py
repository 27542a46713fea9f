"""What a payload costs: microseconds to encode and decode a JobResult, and its size in bytes.

The peers of the suite's converter are those of Temporal's SDK: its default with the same protobuf message, its default
with a dataclass of the same fields, and its pydantic converter with a model of the same fields. The floor is to encode
only the output as UTF-8 and decode it.

    python -m bench.payload_cost
"""

import inspect
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Final

from google.protobuf import json_format
from pydantic import BaseModel, TypeAdapter
from temporalio.contrib.pydantic import pydantic_data_converter
from temporalio.converter import DataConverter, PayloadConverter

import payload_converter
from bench.support import script
from bench.support.report import Report
from llm_pb import llm_pb2


@dataclass(frozen=True)
class Sizes:
    """The options of the command line."""

    rounds: int = 7
    bytes: tuple[int, ...] = (1_000, 100_000, 1_000_000)
    seconds: float = 0.3


@dataclass
class Gpu:
    """GpuInfo of llm.proto as a dataclass, with the names of proto3 JSON."""

    name: str
    count: int


@dataclass
class Metadata:
    """ResultMetadata, with times and durations as strings, like JSON."""

    promptTokens: int  # noqa: N815
    outputTokens: int  # noqa: N815
    queueTime: str  # noqa: N815
    timeToFirstToken: str  # noqa: N815
    latency: str
    gpu: Gpu
    engine: str
    model: str
    worker: str
    attempts: int
    startTime: str  # noqa: N815
    firstTokenTime: str  # noqa: N815


@dataclass
class Result:
    """JobResult."""

    output: str
    finishReason: str  # noqa: N815
    metadata: Metadata


class ResultModel(BaseModel):
    """JobResult as a pydantic model."""

    output: str
    finishReason: str  # noqa: N815
    metadata: Metadata


RESULT: Final = json_format.ParseDict(
    {
        "finishReason": "FINISH_REASON_LENGTH",
        "metadata": {
            "promptTokens": 812,
            "outputTokens": 2048,
            "queueTime": "0.020s",
            "timeToFirstToken": "0.140s",
            "latency": "21.400s",
            "gpu": {"name": "NVIDIA H200", "count": 1},
            "engine": "vllm",
            "model": "docstrings",
            "worker": "gpu-host-17-4242",
            "attempts": 1,
            "startTime": "2026-11-21T12:00:00.020Z",
            "firstTokenTime": "2026-11-21T12:00:00.140Z",
        },
    },
    llm_pb2.JobResult(),
)
_SAMPLE: Final = f"{inspect.getdoc(json)}\nNaïve café, Grüße, 你好.\n"
_RUNS: Final = 10


async def measure(sizes: Sizes) -> Report:
    """Return the report."""
    report = Report(
        "What does a payload cost?",
        "Microseconds to encode and decode a JobResult, and the payload's bytes, metadata included. The output is an"
        " English text with quotes, line ends and a few non-ASCII letters.",
    )
    for size in sizes.bytes:
        case = f"{size // 1000} KB"
        ways = converters(size)
        for _ in range(sizes.rounds):
            for who, (way, payload_bytes) in ways.items():
                report.add(case, who, {"microseconds": microseconds(way, sizes.seconds), "bytes": payload_bytes})
        for figure in ("microseconds", "bytes"):
            for peer in ways:
                if peer.startswith("peer"):
                    report.ratio(case, figure, peer, at_most=1)
    return report


def converters(size: int) -> dict[str, tuple[Callable[[], object], int]]:
    """Return, by name, a function that encodes and decodes a result of this size, and the payload's bytes."""
    message = llm_pb2.JobResult()
    message.CopyFrom(RESULT)
    message.output = text_of(size)
    values = json_format.MessageToDict(message)
    plain, model = TypeAdapter(Result).validate_python(values), ResultModel.model_validate(values)
    pairs: dict[str, tuple[DataConverter, Any, type]] = {
        "suite": (payload_converter.data_converter, message, llm_pb2.JobResult),
        "peer_default_protobuf": (DataConverter.default, message, llm_pb2.JobResult),
        "peer_default_dataclass": (DataConverter.default, plain, Result),
        "peer_pydantic": (pydantic_data_converter, model, ResultModel),
    }
    ways: dict[str, tuple[Callable[[], object], int]] = {}
    for who, (converter, value, kind) in pairs.items():
        way = partial(there_and_back, converter.payload_converter, value, kind)
        if way() != value:
            raise RuntimeError(f"{who} does not decode what it has encoded")
        ways[who] = (way, converter.payload_converter.to_payloads([value])[0].ByteSize())
    return ways | {"floor_utf8": (lambda: message.output.encode().decode(), len(message.output.encode()))}


def text_of(size: int) -> str:
    """Return a text of so many characters."""
    return (_SAMPLE * (size // len(_SAMPLE) + 1))[:size]


def there_and_back(converter: PayloadConverter, value: object, kind: type) -> object:
    """Encode a value; return it decoded."""
    (decoded,) = converter.from_payloads(converter.to_payloads([value]), [kind])
    return decoded


def microseconds(way: Callable[[], object], seconds: float) -> float:
    """Return the microseconds of a call, from the fastest of several runs that take `seconds` together."""
    calls, begin = 0, time.perf_counter()
    while time.perf_counter() - begin < seconds / _RUNS:
        way()
        calls += 1
    fastest = float("inf")
    for _ in range(_RUNS):
        begin = time.perf_counter()
        for _ in range(calls):
            way()
        fastest = min(fastest, time.perf_counter() - begin)
    return fastest / calls * 1e6


if __name__ == "__main__":
    script.run(measure, Sizes(), Sizes(rounds=2, bytes=(1_000, 10_000), seconds=0.01), __doc__)
