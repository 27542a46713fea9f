"""`make fuzz`: many thousand calls of every kind against a new stack, with concurrent attacks.

With `--credentials` the gateway asks for credentials, and most calls have a good one.

A run succeeds if every call gets a proper answer or an error of its client (no INTERNAL, no UNKNOWN, no hanging call),
no process logs a traceback or ends, and the memory of none grows. It prints the seed that repeats the run, and one JSON
object at the end.
"""

import argparse
import asyncio
import contextlib
import itertools
import json
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Final, NamedTuple

import grpc
from google.protobuf.message import Message
from grpc_health.v1 import health_pb2, health_pb2_grpc

from deploy.local.probes import CHANNEL_OPTIONS
from deploy.local.stack import Stack
from llm_pb import batch_pb2, file_pb2, llm_pb2
from llm_pb.file_pb2_grpc import FileServiceStub
from llm_pb.llm_pb2_grpc import LlmServiceStub
from runtime.scopes import SCOPES
from tests.support.attacks import stalled_clients
from tests.support.bad_requests import METHODS, PATHS
from tests.support.credentials import AUDIENCE, ISSUER, Issuer, KeyFile, Metadata, bearer
from tests.support.files import new_file
from tests.support.fuzz_calls import REFLECTION, SERVICE, UPLOAD, Call, Calls
from tests.support.hostile_requests import BODIES
from tests.support.jobs import new_job
from tests.support.stacks import FAST, stack_settings

Code = grpc.StatusCode
CLIENTS: Final = 24
CONNECTIONS: Final = 6
CALL_SECONDS: Final = 180
"""Seconds after which a call counts as hanging."""
STREAM_SECONDS: Final = 2
"""Maximum wait for the first message of a stream, in seconds."""
FURTHER_SECONDS: Final = 0.1
"""Maximum wait for each further one. Most streams have no news: waiting for it was most of what a call took."""
STREAM_MESSAGES: Final = 5
GROWTH_BYTES: Final = 48 << 20
"""Maximum growth of a process's memory from the middle of a run to its end."""
PYTHON: Final = ("gateway", "gpu-worker", "notifier")
ANSWERS: Final = frozenset(
    {
        Code.OK,
        Code.INVALID_ARGUMENT,
        Code.NOT_FOUND,
        Code.ALREADY_EXISTS,
        Code.FAILED_PRECONDITION,
        Code.RESOURCE_EXHAUSTED,
        # Temporal may be late on a busy machine. The error has RetryInfo.
        Code.UNAVAILABLE,
    }
)
ANSWERS_TO: Final[Mapping[str, frozenset[grpc.StatusCode]]] = {
    "key": ANSWERS,
    "token": ANSWERS,
    "of a tenant": ANSWERS,
    # For others' users.
    "bound": ANSWERS | {Code.PERMISSION_DENIED},
    "reader": ANSWERS | {Code.PERMISSION_DENIED},
    "": frozenset({Code.UNAUTHENTICATED}),
}
"""The answers to calls of the gateway's own services, by credential. Those to all others are the answer to none."""
OF_UPLOADS: Final = frozenset({Code.OUT_OF_RANGE, Code.ABORTED})
"""Further answers to UploadFile: the file is not as long as the client thinks, or another call writes it."""
RAW_CREDENTIAL: Final = b"raw-credential"
"""What the credentials of raw_credentials hold, and no log may."""
RAW_NAMES: Final = ("authorization", "authorization", "x-any", "traceparent")
LEFT: Final = "the client left"
SILENT: Final = "no message in time"
"""A stream that was slow to begin: how slow is the machine's matter, and calls of one message that hang are found."""
OVERTAKEN: Final = "the answer came before the last request was sent"
"""The client library itself reports this case as INTERNAL: https://github.com/grpc/grpc/issues/36066"""


class Report(NamedTuple):
    """Result of a run."""

    seed: int
    calls: int
    seconds: float
    codes: dict[str, int]
    """Number of calls by status code."""
    grown_bytes: dict[str, int]
    """Growth of each process's memory from the middle of the run to its end."""
    problems: list[str]


async def big_messages(address: str, rng: random.Random, caller: Metadata) -> list[str]:
    """Send the costliest bodies, eight concurrently, and return the problems with their answers."""
    bodies = [*BODIES.values()]
    rng.shuffle(bodies)

    async def send(bodies: Iterator[tuple[str, bytes]]) -> list[str]:
        problems = []
        async with grpc.aio.insecure_channel(address, options=_OWN_CONNECTION) as channel:
            for name, data in bodies:
                code, details = await _outcome(channel, Call(0, f"{SERVICE}/{name}", (data,), (), None), caller)
                if code not in ANSWERS and code != SILENT:
                    problems.append(f"{name} with {len(data)} bytes: {code} {details}")
        return problems

    queue = iter(bodies)
    return [*itertools.chain(*await asyncio.gather(*(send(queue) for _ in range(8))))]


async def slow_readers(address: str, rng: random.Random, caller: Metadata) -> list[str]:
    """Call methods with large answers, and streams, many times without reading the answers."""
    job = new_job(params={"max_tokens": 400}, user_id=f"slow-{rng.randrange(1 << 30)}")
    async with grpc.aio.insecure_channel(address, options=_OWN_CONNECTION) as channel:
        stub = LlmServiceStub(channel)
        key = new_file(file={"user_id": job.user_id})
        messages = [file_pb2.UploadFileRequest(**key, data=bytes(1 << 20), last=True)]
        uploaded = await FileServiceStub(channel).UploadFile(iter(messages), timeout=CALL_SECONDS, metadata=caller)
        submitted = await stub.Submit(llm_pb2.SubmitRequest(job=job), timeout=CALL_SECONDS, metadata=caller)
        id_ = submitted.workflow_id
        requests: dict[str, Message] = {
            f"{SERVICE}/GetStatus": llm_pb2.GetStatusRequest(workflow_id=id_),
            f"{SERVICE}/GetJob": llm_pb2.GetJobRequest(workflow_id=id_),
            f"{SERVICE}/StreamStatus": llm_pb2.StreamStatusRequest(workflow_id=id_),
            f"{SERVICE}/List": llm_pb2.ListRequest(page_size=100),
            f"{SERVICE}/ListModels": llm_pb2.ListModelsRequest(),
            PATHS["DownloadFile"]: file_pb2.DownloadFileRequest(file_id=uploaded.file.ref.file_id),
            PATHS["ListFiles"]: file_pb2.ListFilesRequest(page_size=100),
            PATHS["ListBatches"]: batch_pb2.ListBatchesRequest(page_size=100),
        }
        async with stalled_clients(address, 4, rng.choice((0, 1, 100))) as clients:
            for method, request in requests.items():
                for client in clients:
                    client.call(f"/{method}", request, 25, caller)
            # The gateway serves this client while the slow readers' answers wait. The stub does not reconnect, so a
            # stream that breaks is a failure.
            followed = llm_pb2.StreamStatusRequest(workflow_id=id_)
            async for _ in stub.StreamStatus(followed, timeout=CALL_SECONDS, metadata=caller):
                pass
    return []


async def large_requests(address: str, rng: random.Random, caller: Metadata) -> list[str]:
    """Send jobs of nearly the maximum size, more than fit at a time, some without their last byte."""
    # No worker serves the model. Such a job costs the gateway as much as any other, and Temporal nothing.
    job = new_job("x" * 1_900_000, model="none", user_id=f"large-{rng.randrange(1 << 30)}")
    body = llm_pb2.SubmitRequest(job=job).SerializeToString()
    async with stalled_clients(address, 8) as clients:
        await asyncio.gather(
            *(
                client.upload(f"/{SERVICE}/Submit", body, 20, caller, withheld=number % 2)
                for number, client in enumerate(clients)
            )
        )
    return []


async def broken_uploads(address: str, rng: random.Random, caller: Metadata) -> list[str]:
    """Upload files whose client sends part of a message and no more, or leaves."""
    key = new_file(file={"user_id": f"broken-{rng.randrange(1 << 30)}"})
    body = file_pb2.UploadFileRequest(**key, data=rng.randbytes(1 << 20)).SerializeToString()
    async with stalled_clients(address, 6, 1 << 16) as clients:
        await asyncio.gather(
            *(
                client.upload(f"/{UPLOAD}", body, 20, caller, withheld=number % 3, followed_by=body[: number % 2 * 99])
                for number, client in enumerate(clients)
            )
        )
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(CALL_SECONDS):
                await asyncio.gather(*(client.all_ended() for client in clients[::2]))
        ended = {number: len(client.ended) for number, client in enumerate(clients)}
        closed = [number for number, client in enumerate(clients) if client.closed.is_set()]
    hanging = (
        {number: count for number, count in ended.items() if count < 20 and number % 2 == 0} if closed == [] else {}
    )
    return [f"uploads hang: of 20 of a client have ended {hanging}"] if hanging else []


async def raw_credentials(address: str, rng: random.Random, _caller: Metadata) -> list[str]:
    """Send credentials of arbitrary bytes, which the libraries of gRPC do not send."""
    request = llm_pb2.ListModelsRequest()
    async with stalled_clients(address, 4, 1 << 16) as clients:
        for client in clients:
            for _ in range(100):
                # gRPC itself ends a connection with a header that has a NUL, CR or LF.
                noise = bytes(rng.choice((*range(0x20, 0x7F), *range(0x80, 0x100))) for _ in range(rng.randint(0, 60)))
                scheme = rng.choice((b"Bearer ", b"Bearer llmk_", b"Basic ", b""))
                value = scheme + RAW_CREDENTIAL + noise
                client.call(f"/{SERVICE}/ListModels", request, metadata=((rng.choice(RAW_NAMES), value),))
        async with asyncio.timeout(CALL_SECONDS):
            await asyncio.gather(*(client.all_ended() for client in clients))
    return []


Attack = Callable[[str, random.Random, Metadata], Coroutine[Any, Any, list[str]]]
ATTACKS: Final[Sequence[Attack]] = (
    big_messages,
    slow_readers,
    large_requests,
    broken_uploads,
    raw_credentials,
)
"""Attacks that run during the second half of the calls. Each takes the gateway's address and the metadata of a caller
who may do everything, and returns problems."""
_OWN_CONNECTION: Final = [*CHANNEL_OPTIONS, ("grpc.use_local_subchannel_pool", 1)]


class Keys:
    """What makes a gateway ask for credentials, and the credentials of its callers."""

    def __init__(self, folder: Path) -> None:
        file, issuer, key_set = KeyFile(folder / "keys.json"), Issuer("fuzz"), folder / "jwks.json"
        key_set.write_bytes(issuer.key_set())
        self.settings = {
            "GATEWAY_API_KEYS_FILE": str(file.path),
            "GATEWAY_JWT_ISSUER": ISSUER,
            "GATEWAY_JWT_AUDIENCE": AUDIENCE,
            "GATEWAY_JWT_KEYS": str(key_set),
        }
        everything = sorted(SCOPES)
        self.known = {
            "key": file.add(everything),
            "token": issuer.token("fuzz", everything, ends_in=24 * 3600),
            "of a tenant": file.add(everything, tenant="fuzz"),
            "bound": file.add(everything, user_id="fuzz-1"),
            "reader": file.add(["jobs:read"]),
            "revoked": file.add(everything),
            "expired": issuer.token("fuzz", everything, ends_in=-3600),
        }
        file.revoke(self.known["revoked"])

    def metadata(self, credential: str) -> Metadata:
        """Return the metadata of a call with a credential."""
        return bearer(self.known.get(credential, credential)) if credential else ()


@asynccontextmanager
async def fuzzed_stack(folder: Path, *, credentials: bool) -> AsyncIterator[tuple[Stack, Keys | None]]:
    """Run a stack to be fuzzed, whose gateway may ask for credentials."""
    keys = Keys(folder) if credentials else None
    gateway = {**FAST["gateway"], "GATEWAY_UPLOAD_STALL_TIMEOUT": "PT1S", **(keys.settings if keys is not None else {})}
    environment = {**FAST, "gateway": gateway}
    async with Stack(stack_settings(folder / "stack"), environment=environment) as stack:
        yield stack, keys


async def fuzz(stack: Stack, keys: Keys | None, seed: int, count: int, seconds: float) -> Report:
    """Make `count` calls of a seed, for at most `seconds`, and return the report.

    `keys` are those of the callers. None: the gateway does not ask for credentials.
    """
    began, codes, problems = time.monotonic(), Counter[str](), list[str]()
    # The jobs are few, so that they cost little next to the calls and many calls refer to each.
    calls = Calls(seed, jobs=max(count // 250, 20), credentials=keys is not None)
    metadata: Callable[[str], Metadata] = keys.metadata if keys is not None else lambda _: ()
    address, numbers = stack.address("gateway"), iter(range(count))
    channels = [grpc.aio.insecure_channel(address, options=_OWN_CONNECTION) for _ in range(CONNECTIONS)]

    async def client(channel: grpc.aio.Channel, until: int) -> None:
        for number in numbers:
            if number and number % 10_000 == 0:
                print(f"{number} calls in {time.monotonic() - began:.0f} s", file=sys.stderr)
            call = calls.call(number)
            code, details = await _outcome(channel, call, metadata(call.credential))
            codes[code.name if isinstance(code, Code) else code] += 1
            if not _is_answer(call, code, asked=keys is not None) and len(problems) < 20:
                problems.append(f"{call}: {code} {details}")
            if number >= until or time.monotonic() - began > seconds:
                return

    async def clients(until: int) -> None:
        await asyncio.gather(*(client(channels[number % CONNECTIONS], until) for number in range(CLIENTS)))

    await clients(count // 2)
    middle = _sizes(stack)
    attacks = [asyncio.create_task(attack(address, random.Random(seed), metadata("key"))) for attack in ATTACKS]
    await clients(count)
    for attack in attacks:
        problems += await attack
    for channel in channels:
        await channel.close()
    if (made := codes.total()) < count:
        problems.append(f"only {made} calls within {seconds} s")
    if not await _serves(address):
        problems.append("the gateway no longer serves")
    end = _sizes(stack)
    grown = {name: end[name] - size for name, size in middle.items() if name in end}
    problems += [f"{name} has grown by {size >> 20} MiB" for name, size in grown.items() if size > GROWTH_BYTES]
    problems += _troubles(stack)
    return Report(seed, made, round(time.monotonic() - began, 1), dict(codes.most_common()), grown, problems)


async def _outcome(channel: grpc.aio.Channel, call: Call, credential: Metadata) -> tuple[grpc.StatusCode | str, str]:
    """Make a call, and return its status code (or another end) with the error message."""
    request: Any = iter(call.requests)
    over = asyncio.Event()
    if "Reflection" in call.method:
        making: Any = channel.stream_stream(f"/{call.method}")
    elif call.method == UPLOAD:
        making = channel.stream_unary(f"/{call.method}")
        request = _stalling(call.requests, over) if call.stalls else request
    else:
        (request,) = call.requests
        making = channel.unary_stream(f"/{call.method}") if _streams(call) else channel.unary_unary(f"/{call.method}")
    made = making(request, metadata=(*call.metadata, *credential), timeout=CALL_SECONDS)
    if call.leave is not None:
        await asyncio.sleep(call.leave)
        made.cancel()
    try:
        if isinstance(made, grpc.aio.UnaryUnaryCall | grpc.aio.StreamUnaryCall):
            await made
        elif not await _read(made):
            return SILENT, ""
    except grpc.aio.AioRpcError as error:
        if error.details() == "Internal error from Core":
            return OVERTAKEN, ""
        return error.code(), error.details() or ""
    except asyncio.CancelledError:
        return LEFT, ""
    finally:
        over.set()
    return Code.OK, ""


def _streams(call: Call) -> bool:
    """Return whether a method of one request answers with a stream."""
    name = call.method.rpartition("/")[2]
    return name == "Watch" or (name in METHODS and METHODS[name].server_streaming)


async def _stalling(requests: Sequence[bytes], until: asyncio.Event) -> AsyncIterator[bytes]:
    """Yield the requests, and then nothing more, without an end before the event."""
    for request in requests:
        yield request
    await until.wait()


async def _read(stream: Any) -> bool:
    """Read a stream to its end, but at most STREAM_MESSAGES messages or until one is late, then cancel it.

    Return False if nothing has come by then.
    """
    messages = 0
    with contextlib.suppress(TimeoutError):
        while messages < STREAM_MESSAGES:
            async with asyncio.timeout(FURTHER_SECONDS if messages else STREAM_SECONDS):
                if await stream.read() is grpc.aio.EOF:
                    return True
            messages += 1
    stream.cancel()
    return messages > 0


def _is_answer(call: Call, code: grpc.StatusCode | str, *, asked: bool) -> bool:
    of_service = call.method.startswith("llm.v1.") and "Nothing" not in call.method
    if asked and of_service and isinstance(code, Code) and code != Code.CANCELLED:
        answers = ANSWERS_TO.get(call.credential, ANSWERS_TO[""])
        return code in (answers | OF_UPLOADS if call.method == UPLOAD and answers > {Code.OK} else answers)
    if code in ANSWERS or (code in OF_UPLOADS and call.method == UPLOAD):
        return True
    if code == OVERTAKEN and (REFLECTION in call.method or call.method == UPLOAD):
        return True
    if code == SILENT:
        return True
    if code in (LEFT, Code.CANCELLED):
        return call.leave is not None
    return code == Code.UNIMPLEMENTED and "Nothing" in call.method


def _sizes(stack: Stack) -> dict[str, int]:
    """Return the resident memory of each running Python process in bytes."""
    sizes = {}
    for name in PYTHON:
        if pid := stack.processes[name].pid:
            status = Path(f"/proc/{pid}/status").read_text()
            sizes[name] = int(status.partition("VmRSS:")[2].split()[0]) * 1024
    return sizes


def _troubles(stack: Stack) -> list[str]:
    """Return a description of each process that has ended and of the first traceback in a log."""
    ended = [f"{name} {process.ending}" for name, process in stack.processes.items() if not process.running]
    logs = {name: stack.processes[name].log for name in PYTHON}
    lines = [(name, line) for name, log in logs.items() for line in log.splitlines() if "Traceback" in line]
    leaks = [f"{name} logs credentials" for name, log in logs.items() if RAW_CREDENTIAL.decode() in log]
    return (
        ended
        + leaks
        + [f"{len(lines)} tracebacks, first in {name}: {line[:1500]} … {line[-1500:]}" for name, line in lines[:1]]
    )


async def _serves(address: str) -> bool:
    async with grpc.aio.insecure_channel(address, options=_OWN_CONNECTION) as channel:
        check = health_pb2_grpc.HealthStub(channel).Check
        try:
            health = await check(health_pb2.HealthCheckRequest(), timeout=CALL_SECONDS)
        except grpc.aio.AioRpcError:
            return False
    return bool(health.status == health_pb2.HealthCheckResponse.SERVING)


async def main() -> int:
    """Fuzz a new stack, print the report, and return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--calls", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(10**9))
    parser.add_argument("--seconds", type=float, default=1800, help="seconds after which the run ends")
    parser.add_argument("--credentials", action="store_true", help="the gateway asks for credentials")
    chosen = parser.parse_args()
    print(f"seed {chosen.seed}", file=sys.stderr)
    with tempfile.TemporaryDirectory() as folder:
        async with fuzzed_stack(Path(folder), credentials=chosen.credentials) as (stack, keys):
            report = await fuzz(stack, keys, chosen.seed, chosen.calls, chosen.seconds)
    print(json.dumps(report._asdict(), indent=2))
    return 1 if report.problems else 0


if __name__ == "__main__":
    sys.exit(asyncio.run(main()))
