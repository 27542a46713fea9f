"""Random calls: valid ones, ones with some changed fields, and random bytes.

Call number n of a seed is always the same, whatever the calls before it did.
"""

import itertools
import random
from collections.abc import Callable, Mapping
from typing import Any, Final, NamedTuple

from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.json_format import MessageToJson
from google.protobuf.message import Message
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection_pb2

from jobs.ids import batch_workflow_id, deletion_workflow_id, file_id, pipeline_workflow_id, schedule_id, workflow_id
from llm_pb import batch_pb2, file_pb2, llm_pb2, pipeline_pb2, schedule_pb2
from tests.support.bad_requests import PATHS, REQUESTS

SERVICE: Final = "llm.v1.LlmService"
REFLECTION: Final = "ServerReflection/ServerReflectionInfo"
UPLOAD: Final = PATHS["UploadFile"]
WEIGHTS: Final[Mapping[str, int]] = {
    f"{SERVICE}/Submit": 24,
    f"{SERVICE}/GetStatus": 14,
    f"{SERVICE}/GetJob": 8,
    f"{SERVICE}/StreamStatus": 12,
    f"{SERVICE}/Cancel": 8,
    f"{SERVICE}/List": 8,
    f"{SERVICE}/ListModels": 6,
    f"{SERVICE}/SetModelAlias": 2,
    f"{SERVICE}/DeleteModelVersion": 2,
    f"{SERVICE}/ListWorkers": 3,
    f"{SERVICE}/ListDeliveries": 4,
    f"{SERVICE}/Redeliver": 4,
    f"{SERVICE}/GetQuota": 2,
    f"{SERVICE}/DeleteJob": 2,
    f"{SERVICE}/DeleteJobs": 1,
    f"{SERVICE}/DeleteUser": 1,
    f"{SERVICE}/GetDeletion": 2,
    PATHS["CreateSchedule"]: 2,
    PATHS["GetSchedule"]: 2,
    PATHS["ListSchedules"]: 2,
    PATHS["UpdateSchedule"]: 1,
    PATHS["PauseSchedule"]: 1,
    PATHS["UnpauseSchedule"]: 1,
    PATHS["TriggerSchedule"]: 1,
    PATHS["BackfillSchedule"]: 1,
    PATHS["DeleteSchedule"]: 2,
    PATHS["UploadFile"]: 8,
    PATHS["DownloadFile"]: 3,
    PATHS["GetFile"]: 2,
    PATHS["ListFiles"]: 2,
    PATHS["DeleteFile"]: 1,
    PATHS["CreateBatch"]: 4,
    PATHS["GetBatch"]: 3,
    PATHS["StreamBatch"]: 2,
    PATHS["StreamBatchResults"]: 3,
    PATHS["CancelBatch"]: 1,
    PATHS["ListBatches"]: 2,
    PATHS["SubmitPipeline"]: 2,
    PATHS["GetPipeline"]: 1,
    PATHS["StreamPipeline"]: 1,
    PATHS["CancelPipeline"]: 1,
    PATHS["AnswerStep"]: 1,
    PATHS["ListPipelines"]: 1,
    "grpc.health.v1.Health/Check": 5,
    "grpc.health.v1.Health/Watch": 3,
    "grpc.health.v1.Health/List": 2,
    f"grpc.reflection.v1.{REFLECTION}": 4,
    f"grpc.reflection.v1alpha.{REFLECTION}": 4,
    f"{SERVICE}/Nothing": 1,
    "nobody.v1.Nothing/Call": 1,
}
"""Relative frequency of each method. Two of the methods do not exist."""
KINDS: Final[Mapping[str, type[Message]]] = {
    **{PATHS[name]: kind for name, kind in REQUESTS.items()},
    "grpc.health.v1.Health/Check": health_pb2.HealthCheckRequest,
    "grpc.health.v1.Health/Watch": health_pb2.HealthCheckRequest,
    "grpc.health.v1.Health/List": health_pb2.HealthListRequest,
    f"grpc.reflection.v1.{REFLECTION}": reflection_pb2.ServerReflectionRequest,
    f"grpc.reflection.v1alpha.{REFLECTION}": reflection_pb2.ServerReflectionRequest,
}
CREDENTIALS: Final = ("key", "token", "of a tenant", "bound", "reader", "revoked", "expired")
"""Credentials that a call may have: those of a Keys of tests.support.fuzz. The last two do not count."""
TEXTS: Final = (
    *("", "a", "llm.v1.LlmService", "llm.v1.JobRequest", "llm.proto", "docstrings", "structured", "user", "é" * 128),
    *("\x00", "\n", "'", '"; --', "../a", "%s%n", "\u202e", "👩\u200d👧", "\ufffd", "a" * 129, "-1", "{}", "[" * 999),
    *("<|end|>", "[[fault:oom@1]]", "((a*)*)*", "http://[::1", "http://127.0.0.1:9/", "AAAA", "NaN", "x" * 5000),
)
NUMBERS: Final = (0, 1, -1, 2, 3, 5, 20, 100, 999_999_999, 2**31 - 1, -(2**31), 2**63 - 1, -(2**63))
FLOATS: Final = (0.0, -0.0, 0.5, 1.0, 2.0, -1.0, 1e308, float("nan"), float("inf"), float("-inf"))
INT64: Final = (FieldDescriptor.TYPE_INT64, FieldDescriptor.TYPE_SINT64)
MAX_DEPTH: Final = 5


class Call(NamedTuple):
    """One call of a method."""

    number: int
    method: str
    requests: tuple[bytes, ...]
    """One request; for methods that take a stream, none to three or so."""
    metadata: tuple[tuple[str, str], ...]
    leave: float | None
    """Seconds after which the client cancels. None: it reads the answer, or some messages of a stream."""
    credential: str = ""
    """One of CREDENTIALS, or a text that is none. Empty: the call has none."""
    stalls: bool = False
    """Whether the client of a stream sends nothing more after its requests, and does not end them."""

    def __str__(self) -> str:
        data = b" ".join(self.requests)
        by = f" by {self.credential[:40]!r}" if self.credential else ""
        return f"call {self.number} of {self.method}{by} with {len(data)} bytes: {data[:80].hex()}"


class Calls:
    """The calls of one seed."""

    def __init__(self, seed: int, jobs: int, *, credentials: bool = False) -> None:
        """`jobs` is the number of different jobs that the valid calls refer to.

        `credentials`: whether the callers have any.
        """
        self._seed = seed
        self._jobs = jobs
        self._credentials = credentials

    def call(self, number: int) -> Call:
        """Return call number n."""
        rng = random.Random(f"{self._seed} {number}")
        (method,) = rng.choices(list(WEIGHTS), list(WEIGHTS.values()))
        requests = self._requests(rng, method)
        metadata = ((rng.choice(("traceparent", "tracestate", "x-any")), _header(rng)),) if rng.random() < 0.2 else ()
        leave = rng.random() * 0.05 if rng.random() < 0.1 else None
        credential = _credential(rng) if self._credentials else ""
        return Call(number, method, requests, metadata, leave, credential, method == UPLOAD and rng.random() < 0.1)

    def _requests(self, rng: random.Random, method: str) -> tuple[bytes, ...]:
        if method != UPLOAD:
            count = rng.randint(0, 3) if REFLECTION in method else 1
            return tuple(self._request(rng, KINDS.get(method, llm_pb2.SubmitRequest)) for _ in range(count))
        number = rng.randrange(self._jobs)
        user, request = self._key(number)
        intact = rng.random() < 0.5
        found = [
            self._sent(rng, message) if not intact and rng.random() < 0.5 else message.SerializeToString()
            for message in upload(rng, number, user, request)
        ]
        return tuple(found if intact else found[: rng.randint(0, len(found))])

    def _request(self, rng: random.Random, kind: type[Message]) -> bytes:
        return self._sent(rng, self._valid(rng, kind))

    def _sent(self, rng: random.Random, message: Message) -> bytes:
        """Return the bytes that a client sends for a valid message: the message, a changed one, or any."""
        how = rng.random()
        if how < 0.1:
            return rng.randbytes(rng.choice((0, 1, 2, 5, 20, 200, 5000)))
        if how < 0.3:
            return random_message(rng, type(message)).SerializeToString()
        if how < 0.6:
            for _ in range(rng.randint(1, 3)):
                change(rng, message)
        data = message.SerializeToString()
        return damage(rng, data) if how > 0.85 else data

    def _key(self, number: int) -> tuple[str, str]:
        """Return user and request of a job, of a schedule, of a file and of a batch."""
        # Users and jobs are few, so that calls meet jobs of earlier calls, and an equal Submit finds the first one.
        return f"fuzz-{number % 7}", f"{self._seed}-{number}"

    def _valid(self, rng: random.Random, kind: type[Message]) -> Message:
        number = rng.randrange(self._jobs)
        user, request = self._key(number)
        if kind is llm_pb2.SubmitRequest:
            return llm_pb2.SubmitRequest(job=job(number, user, request))
        if kind is llm_pb2.ListRequest:
            return llm_pb2.ListRequest(user_id=user, page_size=rng.randint(0, 5))
        if kind is llm_pb2.GetDeletionRequest:
            return llm_pb2.GetDeletionRequest(deletion_id=deletion_workflow_id(workflow_id(user, request)))
        if kind is health_pb2.HealthCheckRequest:
            return health_pb2.HealthCheckRequest(service=rng.choice(("", SERVICE)))
        if kind is reflection_pb2.ServerReflectionRequest:
            return reflection_pb2.ServerReflectionRequest(file_containing_symbol=rng.choice(TEXTS))
        message = kind()
        if "file_id" in kind.DESCRIPTOR.fields_by_name:
            message.file_id = file_id(user, request, "")  # type: ignore[attr-defined]
        if "pipeline_id" in kind.DESCRIPTOR.fields_by_name:
            message.pipeline_id = pipeline_workflow_id(user, request)  # type: ignore[attr-defined]
        if isinstance(message, pipeline_pb2.SubmitPipelineRequest):
            message.pipeline.MergeFrom(
                pipeline_pb2.PipelineRequest(user_id=user, request_id=request, custom={"name": "refine"})
            )
        if "batch_id" in kind.DESCRIPTOR.fields_by_name:
            message.batch_id = batch_workflow_id(user, request)  # type: ignore[attr-defined]
        if isinstance(message, batch_pb2.CreateBatchRequest):
            message.batch.CopyFrom(batch(user, request))
        if "schedule_id" in kind.DESCRIPTOR.fields_by_name:
            message.schedule_id = schedule_id(user, request)  # type: ignore[attr-defined]
        if isinstance(message, schedule_pb2.CreateScheduleRequest | schedule_pb2.UpdateScheduleRequest):
            message.schedule.CopyFrom(schedule(number, user, request))
        if "workflow_id" in kind.DESCRIPTOR.fields_by_name:
            message.workflow_id = workflow_id(user, request)  # type: ignore[attr-defined]
        return message


def job(number: int, user: str, request: str) -> llm_pb2.JobRequest:
    """Return a job that ends after a few tokens."""
    values: dict[str, Any] = {"user_id": user, "request_id": request, "model": "docstrings", "project_id": "fuzz"}
    values |= {"params": {"max_tokens": 1 + number % 4, "temperature": 0, "stop": ["x"]}, "priority": number % 6}
    values |= {"timeouts": {"total": {"seconds": 60}}}
    if number % 4 == 0:
        values["labels"] = {"fuzz": str(number)}
    if number % 5 == 0:
        values["notify"] = [{"webhook": {"url": "http://127.0.0.1:9/"}}]
    if number % 3:
        return llm_pb2.JobRequest(prompt=f"Prompt {number}.", **values)
    return llm_pb2.JobRequest(messages=[{"role": llm_pb2.ROLE_USER, "content": "Hi."}], **values)  # type: ignore[list-item]


def schedule(number: int, user: str, request: str) -> schedule_pb2.Schedule:
    """Return a schedule that starts nothing for months."""
    made = schedule_pb2.Schedule(user_id=user, request_id=request, job=job(number, "", ""))
    made.times.cron.append("0 0 1 1 *")
    return made


def upload(rng: random.Random, number: int, user: str, request: str) -> list[file_pb2.UploadFileRequest]:
    """Return the messages of an upload of the lines of a batch, cut anywhere."""
    lines = [job(number + line, "", f"line-{line}") for line in range(1 + number % 3)]
    content = b"".join(MessageToJson(line, indent=None).encode() + b"\n" for line in lines)
    cuts = sorted(rng.randint(0, len(content)) for _ in range(rng.randint(0, 2)))
    found = [
        file_pb2.UploadFileRequest(offset=start, data=content[start:end])
        for start, end in itertools.pairwise((0, *cuts, len(content)))
    ]
    found[0].file.CopyFrom(file_pb2.File(user_id=user, filename="lines.jsonl", purpose="batch"))
    found[0].request_id = request
    found[-1].last = True
    return found


def batch(user: str, request: str) -> batch_pb2.BatchRequest:
    """Return a batch of the file of upload()."""
    return batch_pb2.BatchRequest(user_id=user, request_id=request, input={"file_id": file_id(user, request, "")})


def random_message(rng: random.Random, kind: Any, depth: int = 0) -> Message:
    """Return a message whose fields have random values, each of which its type can hold."""
    message: Message = kind()
    for field in kind.DESCRIPTOR.fields:
        if rng.random() < 0.6 / (depth + 1):
            fill(rng, message, field, depth)
    return message


def change(rng: random.Random, message: Message) -> None:
    """Change a random field of a message: set another value, clear it, or add very many values."""
    inner = [value for field, value in message.ListFields() if isinstance(value, Message)]
    if inner and rng.random() < 0.7:
        change(rng, rng.choice(inner))
    elif fields := message.DESCRIPTOR.fields:
        field = rng.choice(fields)
        message.ClearField(field.name)
        if rng.random() < 0.8:
            fill(rng, message, field, MAX_DEPTH - 2)


def fill(rng: random.Random, message: Message, field: FieldDescriptor, depth: int) -> None:
    """Set a field to a random value."""
    of_messages = field.message_type is not None
    if field.message_type is not None and field.message_type.GetOptions().map_entry:
        entry = field.message_type.fields_by_name
        for _ in range(rng.choice((1, 1, 2, 5, 20))):
            values, key = getattr(message, field.name), scalar(rng, entry["key"])
            if entry["value"].message_type is not None:
                values[key].CopyFrom(random_message(rng, type(values[key]), depth + 1))
            else:
                values[key] = scalar(rng, entry["value"])
    elif field.is_repeated:
        items = getattr(message, field.name)
        for _ in range(rng.choice((1, 1, 2, 5, 20, 1100))):
            if of_messages:
                item = items.add()
                item.CopyFrom(random_message(rng, type(item), depth + 1))
            else:
                items.append(scalar(rng, field))
    elif of_messages:
        inner = getattr(message, field.name)
        inner.SetInParent()
        if depth < MAX_DEPTH:
            inner.CopyFrom(random_message(rng, type(inner), depth + 1))
    else:
        setattr(message, field.name, scalar(rng, field))


def scalar(rng: random.Random, field: FieldDescriptor) -> Any:
    """Return a random value that the field's type can hold."""
    if field.type == FieldDescriptor.TYPE_STRING:
        return rng.choice(TEXTS)
    if field.type == FieldDescriptor.TYPE_BYTES:
        return rng.randbytes(rng.randint(0, 50))
    if field.type == FieldDescriptor.TYPE_BOOL:
        return rng.random() < 0.5
    if field.type == FieldDescriptor.TYPE_DOUBLE:
        return rng.choice(FLOATS)
    number = rng.choice(NUMBERS)
    return number if field.type in INT64 else max(-(2**31), min(2**31 - 1, number))


def damage(rng: random.Random, data: bytes) -> bytes:
    """Return the bytes as a broken or hostile client would send them."""
    start, end = sorted((rng.randint(0, len(data)), rng.randint(0, len(data))))
    ways: tuple[Callable[[], bytes], ...] = (
        lambda: data[:end],
        lambda: data[start:],
        lambda: data[:start] + data[end:],
        lambda: data[:end] + data[start:],
        lambda: data[:start] + rng.randbytes(end - start) + data[end:],
        lambda: data[:start] + bytes(byte ^ 1 << rng.randrange(8) for byte in data[start:end]) + data[end:],
        lambda: data + data[start:end] * 200,
        lambda: data * 20,
    )
    return rng.choice(ways)()


def _credential(rng: random.Random) -> str:
    """Return mostly a good one, sometimes one of another caller, a bad one or none."""
    how = rng.random()
    if how < 0.65:
        return "key"
    if how < 0.8:
        return rng.choice(CREDENTIALS)
    if how < 0.9:
        return ""
    token = ".".join(rng.choice(("e30", "eyJhbGciOiJSUzI1NiIsImtpZCI6ImEifQ", "AAAA", "")) for _ in range(3))
    printable = "".join(chr(rng.randrange(0x20, 0x7F)) for _ in range(rng.choice((1, 5, 60, 3000))))
    return rng.choice(("llmk_", "llmk__", f"llmk_{printable}", token, printable, "x"))


def _header(rng: random.Random) -> str:
    trace = f"00-{rng.getrandbits(128):032x}-{rng.getrandbits(64):016x}-01"
    return rng.choice((trace, trace[:-1], "", "00-" + "0" * 32 + "-" + "0" * 16 + "-00", "a=b," * 100, "~" * 500))
