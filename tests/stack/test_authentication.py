"""Who may call a gateway, and for what: every method with every kind of credential, at gateways of their own."""

import asyncio
import base64
import hashlib
import hmac
import json
import time
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Any

import grpc
import jwt
import pytest
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from google.protobuf.message import Message
from google.rpc import error_details_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from deploy.local.stack import Stack
from durable_llm import AsyncClient
from durable_llm.errors import CredentialInvalid
from jobs.ids import batch_workflow_id, pipeline_workflow_id, workflow_id
from llm_pb import batch_pb2, file_pb2, llm_pb2, pipeline_pb2, schedule_pb2
from llm_pb.batch_pb2_grpc import BatchServiceStub
from llm_pb.file_pb2_grpc import FileServiceStub
from llm_pb.llm_pb2_grpc import LlmServiceStub
from llm_pb.pipeline_pb2_grpc import PipelineServiceStub
from llm_pb.schedule_pb2_grpc import ScheduleServiceStub
from services.gateway import scopes
from services.gateway.methods import SERVICES
from tests.support.attacks import stalled_clients
from tests.support.bad_batches import batch
from tests.support.bad_files import NO_FILE
from tests.support.bad_pipelines import valid_pipeline
from tests.support.bad_requests import METHODS, PATHS
from tests.support.bad_schedules import valid
from tests.support.batches import Stubs, create, lines_of
from tests.support.commands import run
from tests.support.credentials import (
    AUDIENCE,
    ISSUER,
    CallsAs,
    Issuer,
    KeyFile,
    KeySetServer,
    Metadata,
    bearer,
    claims_of,
)
from tests.support.files import get, listed, new_file, until, upload
from tests.support.jobs import details_of, new_job, webhook
from tests.support.schedules import new_schedule
from tests.support.scrapes import Scrape, scrape_until
from tests.support.stacks import tool
from tests.support.temporal_proxy import temporal_proxy

SERVICE = llm_pb2.DESCRIPTOR.services_by_name["LlmService"]
LIST_SERVICES = reflection_pb2.ServerReflectionRequest(list_services="")
NO_JOB, NO_BATCH = "llmjob-nobody-1", "llmbatch-nobody-1"
REQUESTS: Mapping[str, Callable[[], Message]] = {
    "Submit": lambda: llm_pb2.SubmitRequest(job=new_job(model="idle")),
    "GetStatus": lambda: llm_pb2.GetStatusRequest(workflow_id=NO_JOB),
    "GetJob": lambda: llm_pb2.GetJobRequest(workflow_id=NO_JOB),
    "StreamStatus": lambda: llm_pb2.StreamStatusRequest(workflow_id=NO_JOB),
    "Cancel": lambda: llm_pb2.CancelRequest(workflow_id=NO_JOB),
    "List": lambda: llm_pb2.ListRequest(),
    "ListModels": lambda: llm_pb2.ListModelsRequest(),
    "SetModelAlias": lambda: llm_pb2.SetModelAliasRequest(model="nothing", alias="a", version=1),
    "DeleteModelVersion": lambda: llm_pb2.DeleteModelVersionRequest(model="nothing", version=1),
    "ListWorkers": lambda: llm_pb2.ListWorkersRequest(),
    "ListDeliveries": lambda: llm_pb2.ListDeliveriesRequest(workflow_id=NO_JOB),
    "Redeliver": lambda: llm_pb2.RedeliverRequest(workflow_id=NO_JOB),
    "GetQuota": lambda: llm_pb2.GetQuotaRequest(),
    "DeleteJob": lambda: llm_pb2.DeleteJobRequest(workflow_id=NO_JOB),
    "DeleteJobs": lambda: llm_pb2.DeleteJobsRequest(user_id="nobody"),
    "DeleteUser": lambda: llm_pb2.DeleteUserRequest(user_id="nobody"),
    "GetDeletion": lambda: llm_pb2.GetDeletionRequest(deletion_id=f"llmdelete-{NO_JOB}"),
    "CreateSchedule": lambda: schedule_pb2.CreateScheduleRequest(schedule=new_schedule(), paused=True),
    **{name: partial(valid, name) for name in METHODS if "Schedule" in name and name != "CreateSchedule"},
    "UploadFile": lambda: file_pb2.UploadFileRequest(**new_file(), data=b"x", last=True),
    "DownloadFile": lambda: file_pb2.DownloadFileRequest(file_id=NO_FILE),
    "GetFile": lambda: file_pb2.GetFileRequest(file_id=NO_FILE),
    "ListFiles": lambda: file_pb2.ListFilesRequest(),
    "DeleteFile": lambda: file_pb2.DeleteFileRequest(file_id=NO_FILE),
    "CreateBatch": lambda: batch_pb2.CreateBatchRequest(batch=batch()),
    "GetBatch": lambda: batch_pb2.GetBatchRequest(batch_id=NO_BATCH),
    "StreamBatch": lambda: batch_pb2.StreamBatchRequest(batch_id=NO_BATCH),
    "StreamBatchResults": lambda: batch_pb2.StreamBatchResultsRequest(batch_id=NO_BATCH),
    "CancelBatch": lambda: batch_pb2.CancelBatchRequest(batch_id=NO_BATCH),
    "ListBatches": lambda: batch_pb2.ListBatchesRequest(),
    **{name: partial(valid_pipeline, name) for name in METHODS if "Pipeline" in name or name == "AnswerStep"},
}
"""A valid request of each method, about a job, schedule, file, batch or pipeline that does not exist."""
ALSO_NEEDED = {"CreateBatch": ["files:read"], "DeleteUser": ["files:delete", "schedules:write"]}
"""The scopes that a method needs as well as its own, whatever the request is."""
FINDS_NOTHING = {"GetStatus", "GetJob", "StreamStatus", "Cancel", "ListDeliveries", "Redeliver", "DeleteJob"}
FINDS_NO_SCHEDULE = {name for name in METHODS if "Schedule" in name} - {"CreateSchedule", "ListSchedules"}
FINDS_NO_FILE = {"DownloadFile", "GetFile", "DeleteFile", "CreateBatch"}
FINDS_NO_BATCH = {"GetBatch", "StreamBatch", "StreamBatchResults", "CancelBatch"}
FINDS_NO_PIPELINE = {"GetPipeline", "StreamPipeline", "CancelPipeline", "AnswerStep"}
OF_ANOTHER_TENANT: Mapping[str, str] = {
    "Submit": "is a job of its own",
    "GetStatus": "is not found",
    "GetJob": "is not found",
    "StreamStatus": "is not found",
    "Cancel": "is not found",
    "List": "is not listed",
    "ListModels": "is about no job",
    "SetModelAlias": "is about no job",
    "DeleteModelVersion": "is about no job",
    "ListWorkers": "is about no job",
    "ListDeliveries": "is not found",
    "Redeliver": "is not found",
    "GetQuota": "is not counted",
    "DeleteJob": "is not found",
    "DeleteJobs": "is not deleted",
    "DeleteUser": "is not deleted",
    "GetDeletion": "has no deletion",
    "CreateSchedule": "is a schedule of its own",
    "ListSchedules": "is no listed schedule",
    **dict.fromkeys(sorted(FINDS_NO_SCHEDULE), "is no schedule"),
    "UploadFile": "is a file of its own",
    "ListFiles": "is no listed file",
    **dict.fromkeys(sorted(FINDS_NO_FILE), "is no file"),
    "ListBatches": "is no listed batch",
    **dict.fromkeys(sorted(FINDS_NO_BATCH), "is no batch"),
    "SubmitPipeline": "is a pipeline of its own",
    "ListPipelines": "is no listed pipeline",
    **dict.fromkeys(sorted(FINDS_NO_PIPELINE), "is no pipeline"),
}
"""What a job, schedule, file, batch or pipeline of another tenant is to each method."""


def nothing_at(method: str) -> str | None:
    """Return the reason for which a valid request about nothing fails; None if it does not."""
    reasons = {
        "JOB_NOT_FOUND": FINDS_NOTHING,
        "DELETION_NOT_FOUND": {"GetDeletion"},
        "SCHEDULE_NOT_FOUND": FINDS_NO_SCHEDULE,
        "FILE_NOT_FOUND": FINDS_NO_FILE,
        "BATCH_NOT_FOUND": FINDS_NO_BATCH,
        "PIPELINE_NOT_FOUND": FINDS_NO_PIPELINE,
        "MODEL_NOT_FOUND": {"SetModelAlias", "DeleteModelVersion"},
    }
    return next((reason for reason, methods in reasons.items() if method in methods), None)


PATIENCE = 60
ALL = sorted(scopes.SCOPES)
RSA, EC = "rsa-1", "ec-1"
TENANTS = ("acme", "acme-2", "Globex")


class Guarded:
    """A gateway that asks who calls, and what its callers have."""

    def __init__(self, folder: Path) -> None:
        self.file = KeyFile(folder / "keys.json")
        self.issuer = Issuer(RSA, EC)
        self.server = KeySetServer(self.issuer.key_set())
        self.revoked = self.file.add(ALL)
        self.file.revoke(self.revoked)
        self.expired = self.file.add(ALL, not_after=datetime.now(UTC) - timedelta(seconds=1))
        self.by_scope = {scope: self.file.add([scope]) for scope in scopes.OF_METHOD.values()}
        self.without_scope = {
            scope: self.file.add(scopes.SCOPES - {scope, f"{scope.partition(':')[0]}:*"}) for scope in self.by_scope
        }
        self.with_further_scope = {
            method: self.file.add([scopes.OF_METHOD[f"/{PATHS[method]}"], *also])
            for method, also in ALSO_NEEDED.items()
        }
        self.all = self.file.add(ALL)
        self.of_tenant = {tenant: self.file.add(ALL, tenant=tenant) for tenant in TENANTS}
        self.channel: grpc.aio.Channel
        self.address = ""

    def settings(self, url: str) -> dict[str, str]:
        return {
            "GATEWAY_API_KEYS_FILE": str(self.file.path),
            "GATEWAY_JWT_ISSUER": ISSUER,
            "GATEWAY_JWT_AUDIENCE": AUDIENCE,
            "GATEWAY_JWT_KEYS": url,
        }

    @property
    def stub(self) -> LlmServiceStub:
        return LlmServiceStub(self.channel)

    @property
    def schedules(self) -> ScheduleServiceStub:
        return ScheduleServiceStub(self.channel)

    def files(self, credential: str) -> Any:
        stub: Any = FileServiceStub(self.channel)
        return CallsAs(stub, credential)

    def batches(self, credential: str) -> Stubs:
        stub: Any = BatchServiceStub(self.channel)
        return Stubs(self.files(credential), CallsAs(stub, credential))

    def pipelines(self, credential: str) -> Any:
        stub: Any = PipelineServiceStub(self.channel)
        return CallsAs(stub, credential)

    async def call(self, method: str, metadata: Metadata, data: bytes | None = None) -> grpc.aio.AioRpcError | None:
        """Call a method; return what it failed with, if it did."""
        return await call(self.channel, method, metadata, data)

    async def until_accepted(self, credential: str) -> None:
        """Return once a call is not refused."""
        async with asyncio.timeout(PATIENCE):
            while await self.call("ListModels", bearer(credential)) is not None:  # noqa: ASYNC110
                await asyncio.sleep(0.1)

    async def until_refused(self, credential: str) -> grpc.aio.AioRpcError:
        """Return the error of the first call that is refused."""
        async with asyncio.timeout(PATIENCE):
            while (error := await self.call("ListModels", bearer(credential))) is None:  # noqa: ASYNC110
                await asyncio.sleep(0.1)
        return error


async def call(
    channel: grpc.aio.Channel, method: str, metadata: Metadata, data: bytes | None = None
) -> grpc.aio.AioRpcError | None:
    request = REQUESTS[method]().SerializeToString() if data is None else data
    path = f"/{PATHS[method]}"
    try:
        if METHODS[method].client_streaming:
            await channel.stream_unary(path)(iter([request]), metadata=metadata, timeout=PATIENCE)
        elif METHODS[method].server_streaming:
            await channel.unary_stream(path)(request, metadata=metadata, timeout=PATIENCE).read()
        else:
            await channel.unary_unary(path)(request, metadata=metadata, timeout=PATIENCE)
    except grpc.aio.AioRpcError as error:
        return error
    return None


async def read_to_end(stream: Any) -> None:
    while await stream.read() is not grpc.aio.EOF:
        pass


@asynccontextmanager
async def running(stack: Stack, settings: dict[str, str]) -> AsyncIterator[tuple[grpc.aio.Channel, Any]]:
    gateway = stack.add("gateway", settings)
    await gateway.start()
    await gateway.wait_ready()
    async with grpc.aio.insecure_channel(stack.address(gateway.name)) as channel:
        yield channel, gateway
    await gateway.terminate()
    assert gateway.returncode == 0
    # Whatever is presented is an answer, not an error of the server.
    assert "runtime/auth" not in gateway.log
    assert "runtime/grpc_auth" not in gateway.log


@pytest.fixture(scope="module")
async def guarded(stack: Stack, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Guarded]:
    made = Guarded(tmp_path_factory.mktemp("guarded"))
    with made.server.serving() as url:
        async with running(stack, made.settings(url)) as (channel, gateway):
            made.channel = channel
            made.address = stack.address(gateway.name)
            yield made


def reason_of(error: grpc.aio.AioRpcError | None) -> tuple[str, str]:
    assert error is not None, "it was let in"
    info: error_details_pb2.ErrorInfo = details_of(error)["ErrorInfo"]
    assert info.domain == "llm.v1"
    return error.code().name, info.reason


def segment(value: Any) -> bytes:
    return base64.urlsafe_b64encode(json.dumps(value).encode()).rstrip(b"=")


def unsigned(algorithm: str, scopes: list[str]) -> bytes:
    return segment({"alg": algorithm, "typ": "JWT", "kid": RSA}) + b"." + segment(claims_of(scopes))


def hs256_with_the_public_key(issuer: Issuer, encoding: Encoding) -> str:
    """What a library accepts that takes the algorithm from the token and the public key for a shared secret."""
    form = PublicFormat.PKCS1 if encoding == Encoding.DER else PublicFormat.SubjectPublicKeyInfo
    secret = issuer.keys[RSA].public_key().public_bytes(encoding, form)
    data = unsigned("HS256", ALL)
    signature = base64.urlsafe_b64encode(hmac.digest(secret, data, hashlib.sha256)).rstrip(b"=")
    return (data + b"." + signature).decode()


MISSING, INVALID, EXPIRED = (
    ("UNAUTHENTICATED", "CREDENTIAL_MISSING"),
    ("UNAUTHENTICATED", "CREDENTIAL_INVALID"),
    ("UNAUTHENTICATED", "CREDENTIAL_EXPIRED"),
)
DENIED = ("PERMISSION_DENIED", "MISSING_SCOPE")
REFUSED: Mapping[str, tuple[Callable[[Guarded], Metadata], tuple[str, str]]] = {
    "no credential": (lambda _: (), MISSING),
    "basic": (lambda _: (("authorization", "Basic YTpi"),), INVALID),
    "an empty token": (lambda _: (("authorization", "Bearer "),), INVALID),
    "two credentials": (lambda known: bearer(known.all) * 2, INVALID),
    "key: unknown": (lambda known: bearer(known.all[:-1] + ("a" if known.all[-1] != "a" else "b")), INVALID),
    "key: of no form": (lambda _: bearer("llmk_"), INVALID),
    "key: revoked": (lambda known: bearer(known.revoked), INVALID),
    "key: expired": (lambda known: bearer(known.expired), EXPIRED),
    "token: garbage": (lambda _: bearer("a.b.c"), INVALID),
    "token: deep": (lambda _: bearer(base64.urlsafe_b64encode(b"[" * 5000).decode().rstrip("=") + ".e30.e30"), INVALID),
    "token: expired": (lambda known: bearer(known.issuer.token(RSA, ALL, ends_in=-90)), EXPIRED),
    "token: not yet": (lambda known: bearer(known.issuer.token(RSA, ALL, nbf=int(time.time()) + 900)), INVALID),
    "token: another audience": (lambda known: bearer(known.issuer.token(RSA, ALL, aud="other")), INVALID),
    "token: no audience": (lambda known: bearer(known.issuer.token(RSA, ALL, aud=None)), INVALID),
    "token: another issuer": (lambda known: bearer(known.issuer.token(RSA, ALL, iss="https://evil.test/")), INVALID),
    "token: no subject": (lambda known: bearer(known.issuer.token(RSA, ALL, sub=None)), INVALID),
    "token: no end": (lambda known: bearer(known.issuer.token(RSA, ALL, exp=None)), INVALID),
    "token: another's signature": (lambda _: bearer(Issuer(RSA).token(RSA, ALL)), INVALID),
    "token: alg none": (lambda _: bearer(unsigned("none", ALL).decode() + "."), INVALID),
    "token: alg none, signed": (lambda _: bearer(unsigned("none", ALL).decode() + ".AAAA"), INVALID),
    "token: HS256 with the public key in PEM": (
        lambda known: bearer(hs256_with_the_public_key(known.issuer, Encoding.PEM)),
        INVALID,
    ),
    "token: HS256 with the public key in DER": (
        lambda known: bearer(hs256_with_the_public_key(known.issuer, Encoding.DER)),
        INVALID,
    ),
    "token: another key's name": (
        lambda known: bearer(jwt.encode(claims_of(ALL), known.issuer.keys[EC], "ES256", {"kid": RSA})),
        INVALID,
    ),
    "token: no key's name": (
        lambda known: bearer(jwt.encode(claims_of(ALL), known.issuer.keys[RSA], "RS256")),
        INVALID,
    ),
    "token: an algorithm that is not allowed": (
        lambda known: bearer(jwt.encode(claims_of(ALL), known.issuer.keys[RSA], "PS256", {"kid": RSA})),
        INVALID,
    ),
}
"""What is refused at every method, and how."""


def test_every_method_is_in_the_matrix() -> None:
    """A new one needs a request above, and a scope in services.gateway.scopes."""
    assert set(REQUESTS) == set(METHODS)
    assert set(OF_ANOTHER_TENANT) == set(METHODS)


OPEN: Mapping[str, Message] = {
    "grpc.health.v1.Health/Check": health_pb2.HealthCheckRequest(),
    "grpc.health.v1.Health/Watch": health_pb2.HealthCheckRequest(),
    "grpc.health.v1.Health/List": health_pb2.HealthListRequest(),
    "grpc.reflection.v1.ServerReflection/ServerReflectionInfo": LIST_SERVICES,
    "grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo": LIST_SERVICES,
}
"""A request of each method that is open to everybody."""
SIX = ("no credential", "key: expired", "token: expired", "token: another audience", "key: revoked")


async def test_every_service_of_a_gateway_is_in_the_matrix(guarded: Guarded) -> None:
    """A new one needs rows of its own."""
    stub = reflection_pb2_grpc.ServerReflectionStub(guarded.channel)
    answer = await stub.ServerReflectionInfo(iter([LIST_SERVICES])).read()
    served = {service.name for service in answer.list_services_response.service}
    assert served | {"grpc.reflection.v1.ServerReflection", "grpc.reflection.v1alpha.ServerReflection"} == {
        *SERVICES,
        *(method.partition("/")[0] for method in OPEN),
    }


@pytest.mark.parametrize("method", OPEN)
@pytest.mark.parametrize("case", [*SIX, "another tenant", "missing scope", "right"])
async def test_health_and_reflection_answer_everybody_the_same(guarded: Guarded, method: str, case: str) -> None:
    good = {
        "another tenant": guarded.of_tenant["acme"],
        "missing scope": guarded.without_scope["jobs:read"],
        "right": guarded.all,
    }
    metadata = bearer(good[case]) if case in good else REFUSED[case][0](guarded)
    request = OPEN[method].SerializeToString()
    if "Reflection" in method:
        answer = await guarded.channel.stream_stream(f"/{method}")(iter([request]), metadata=metadata).read()
    elif method.endswith("/Watch"):
        watching = guarded.channel.unary_stream(f"/{method}")(request, metadata=metadata)
        answer = await watching.read()
        watching.cancel()
    else:
        answer = await guarded.channel.unary_unary(f"/{method}")(request, metadata=metadata, timeout=PATIENCE)
    assert SERVICE.full_name.encode() in answer or answer == b"\x08\x01"


@pytest.mark.parametrize("method", REQUESTS)
@pytest.mark.parametrize("case", REFUSED)
async def test_who_is_unknown_gets_nowhere(guarded: Guarded, method: str, case: str) -> None:
    """Before a byte of the request is parsed: garbage is not said to be garbage."""
    metadata, expected = REFUSED[case]
    error = await guarded.call(method, metadata(guarded), b"\xff\xff\xff")
    assert reason_of(error) == expected
    assert error is not None
    challenge = dict(error.trailing_metadata() or ())["www-authenticate"]
    assert challenge == ("Bearer" if expected == MISSING else 'Bearer error="invalid_token"')


async def test_a_refused_call_is_measured(stack: Stack, tmp_path: Path) -> None:
    """By its method and code, like a call that is served."""
    made = Guarded(tmp_path)
    async with running(stack, {"GATEWAY_API_KEYS_FILE": str(made.file.path)}) as (channel, gateway):
        for metadata in ((), bearer(made.without_scope["jobs:submit"])):
            assert await call(channel, "Submit", metadata) is not None

        def counted(found: Scrape) -> dict[str, float]:
            labels = ("rpc_method", "rpc_response_status_code")
            calls = found.by("rpc_server_call_duration_seconds_count", *labels)
            return {code: calls.get((f"{SERVICE.full_name}/Submit", code), 0) for code in (MISSING[0], DENIED[0])}

        once = {MISSING[0]: 1, DENIED[0]: 1}
        assert counted(await scrape_until(stack, lambda found: counted(found) == once, gateway.name)) == once


@pytest.mark.parametrize("method", REQUESTS)
@pytest.mark.parametrize("kind", ["key", "RSA token", "EC token"])
async def test_the_scope_of_a_method_is_needed_and_enough(guarded: Guarded, method: str, kind: str) -> None:
    scope = scopes.OF_METHOD[f"/{PATHS[method]}"]
    kid = EC if kind == "EC token" else RSA
    if kind == "key":
        right = guarded.with_further_scope.get(method, guarded.by_scope[scope])
        without = guarded.without_scope[scope]
    else:
        without = guarded.issuer.token(kid, scopes.SCOPES - {scope, f"{scope.partition(':')[0]}:*"})
        right = guarded.issuer.token(kid, [scope, *ALSO_NEEDED.get(method, ["openid"])])
    error = await guarded.call(method, bearer(without), b"\xff\xff\xff")
    assert reason_of(error) == DENIED
    assert error is not None
    assert details_of(error)["ErrorInfo"].metadata["scope"] == scope
    error = await guarded.call(method, bearer(right))
    nothing = nothing_at(method)
    # No pipeline is registered here.
    unknown = ("INVALID_ARGUMENT", "INVALID_REQUEST") if method == "SubmitPipeline" else None
    assert (None if error is None else reason_of(error)) == (("NOT_FOUND", nothing) if nothing else unknown)


async def test_a_credential_of_any_bytes_is_refused_and_not_logged(stack: Stack, tmp_path: Path) -> None:
    """gRPC would log the whole header, and a traceback. Only hand-made HTTP/2 can send such bytes."""
    made = Guarded(tmp_path)
    async with running(stack, {"GATEWAY_API_KEYS_FILE": str(made.file.path)}) as (channel, gateway):
        async with stalled_clients(stack.address(gateway.name), window=1 << 16) as (client,):
            for noise in (b"\xff\xfe", b"\xc3\xa9", b"\xed\xb3\xbf", b"\x80"):
                for name in ("authorization", "x-any", "traceparent"):
                    value = b"Bearer llmk_a_secret" + noise
                    client.call(f"/{SERVICE.full_name}/ListModels", REQUESTS["ListModels"](), 1, ((name, value),))
            async with asyncio.timeout(PATIENCE):
                await client.all_ended()
            assert not client.closed.is_set()
        assert await call(channel, "ListModels", bearer(made.all)) is None
    assert "secret" not in gateway.log
    assert "Traceback" not in gateway.log


async def test_who_sends_no_request_is_refused_all_the_same(guarded: Guarded) -> None:
    """At once: no place is held for one."""
    refused = guarded.channel.stream_unary(f"/{SERVICE.full_name}/Submit")(timeout=PATIENCE)
    with pytest.raises(grpc.aio.AioRpcError) as error:
        await refused
    assert reason_of(error.value) == MISSING


@pytest.mark.parametrize(
    ("needed", "job"),
    [
        ("jobs:notify", {"notify": webhook("https://example.com/")}),
        ("jobs:structured", {"params": {"regex": "a"}}),
        ("jobs:structured", {"params": {"json_schema": "{}"}}),
        ("jobs:structured", {"params": {"choice": {"options": ["a"]}}}),
        ("jobs:priority", {"priority": 2}),
    ],
)
async def test_what_costs_others_needs_a_scope_of_its_own(
    guarded: Guarded, needed: str, job: dict[str, Any], stack: Stack
) -> None:
    """Also for a job that breaks a rule, of which nothing is said, and beside the scope to submit."""
    key = guarded.by_scope["jobs:submit"]
    for request in (new_job(**job), new_job(**{**job, "model": ""})):
        data = llm_pb2.SubmitRequest(job=request).SerializeToString()
        error = await guarded.call("Submit", bearer(key), data)
        assert reason_of(error) == DENIED
        assert error is not None
        assert details_of(error)["ErrorInfo"].metadata["scope"] == needed
    request = llm_pb2.SubmitRequest(job=new_job(**{"model": "structured", **job}))
    error = await guarded.call("Submit", bearer(guarded.all), request.SerializeToString())
    # The operator's bound is another thing.
    assert error is None or reason_of(error) == ("INVALID_ARGUMENT", "INVALID_REQUEST")


async def test_a_clock_may_be_off_by_less_than_a_minute(guarded: Guarded) -> None:
    now = int(time.time())
    for token in (
        guarded.issuer.token(RSA, ALL, ends_in=-20),
        guarded.issuer.token(RSA, ALL, iat=now + 40, nbf=now + 40),
    ):
        assert await guarded.call("ListModels", bearer(token)) is None


async def test_a_key_counts_as_soon_as_it_is_in_the_file_and_no_longer(guarded: Guarded) -> None:
    """Without a restart; also when somebody has spoilt the file meanwhile."""
    key = guarded.file.add(ALL)
    await guarded.until_accepted(key)
    good = guarded.file.path.read_bytes()
    guarded.file.path.write_bytes(b'[{"id": "x"')
    assert await guarded.call("ListModels", bearer(key)) is None
    guarded.file.path.write_bytes(good)
    guarded.file.revoke(key)
    assert reason_of(await guarded.until_refused(key)) == INVALID


async def test_a_stream_ends_with_its_credential(guarded: Guarded, stub: LlmServiceStub) -> None:
    """Each within seconds: a key revoked, a key and a token expired. Others that watch the same job go on."""
    job = new_job(model="idle")
    id_ = (await stub.Submit(llm_pb2.SubmitRequest(job=job))).workflow_id
    revoked, kept = guarded.file.add(ALL), guarded.file.add(ALL)
    soon = guarded.file.add(ALL, not_after=datetime.now(UTC) + timedelta(seconds=25))
    # Leeway is a minute.
    token = guarded.issuer.token(RSA, ALL, ends_in=-30)
    await guarded.until_accepted(soon)
    request = llm_pb2.StreamStatusRequest(workflow_id=id_)
    streams = {name: guarded.stub.StreamStatus(request, metadata=bearer(name)) for name in (revoked, soon, token, kept)}
    for stream in streams.values():
        assert (await stream.read()).status.state == llm_pb2.JOB_STATE_QUEUED
    guarded.file.revoke(revoked)
    for name, reason in ((revoked, INVALID), (soon, EXPIRED), (token, EXPIRED)):
        with pytest.raises(grpc.aio.AioRpcError) as error:
            await asyncio.wait_for(read_to_end(streams[name]), 2 * PATIENCE)
        assert reason_of(error.value) == reason
    async with asyncio.timeout(PATIENCE):
        for _ in range(3):
            assert await streams[kept].read() is not grpc.aio.EOF
    streams[kept].cancel()


async def test_a_key_of_one_user_is_for_this_users_jobs(guarded: Guarded, stub: LlmServiceStub) -> None:
    """Another's job and one that does not exist are the same bytes."""
    own, others = new_job(model="idle"), new_job(model="idle")
    key = guarded.file.add(ALL, user_id=own.user_id)
    await guarded.until_accepted(key)
    metadata = bearer(key)
    foreign = (await stub.Submit(llm_pb2.SubmitRequest(job=others))).workflow_id
    with pytest.raises(grpc.aio.AioRpcError) as error:
        await guarded.stub.Submit(llm_pb2.SubmitRequest(job=others), metadata=metadata)
    assert reason_of(error.value) == ("PERMISSION_DENIED", "USER_NOT_ALLOWED")
    mine = (await guarded.stub.Submit(llm_pb2.SubmitRequest(job=own), metadata=metadata)).workflow_id
    missing = f"{foreign[:-1]}x"
    for method in sorted(FINDS_NOTHING):
        kind = type(REQUESTS[method]())
        answers = []
        for id_ in (foreign, missing):
            error_ = await guarded.call(method, metadata, kind(workflow_id=id_).SerializeToString())
            assert reason_of(error_) == ("NOT_FOUND", "JOB_NOT_FOUND"), method
            assert error_ is not None
            trailers = [(key, value) for key, value in error_.trailing_metadata() or ()]
            answers.append(str((error_.details(), trailers)).replace(id_, "ID"))
        assert answers[0] == answers[1]
    assert (await stub.GetStatus(llm_pb2.GetStatusRequest(workflow_id=foreign))).status.cancel_requested is False
    found = await guarded.stub.GetStatus(llm_pb2.GetStatusRequest(workflow_id=mine), metadata=metadata)
    assert found.status.workflow_id == mine
    stream = guarded.stub.StreamStatus(llm_pb2.StreamStatusRequest(workflow_id=mine), metadata=metadata)
    assert (await stream.read()).status.workflow_id == mine
    stream.cancel()
    with pytest.raises(grpc.aio.AioRpcError) as error:
        await guarded.stub.List(llm_pb2.ListRequest(user_id=others.user_id), metadata=metadata)
    assert reason_of(error.value) == ("PERMISSION_DENIED", "USER_NOT_ALLOWED")
    async with asyncio.timeout(PATIENCE):
        while not (page := await guarded.stub.List(llm_pb2.ListRequest(), metadata=metadata)).jobs:  # noqa: ASYNC110
            await asyncio.sleep(0.1)
    assert {job.user_id for job in page.jobs} == {own.user_id}


def answer_of(error: grpc.aio.AioRpcError | None, id_: str) -> str:
    """Return all that a client gets of a refused call, without the id."""
    assert error is not None
    trailers = [(key, value) for key, value in error.trailing_metadata() or ()]
    return str((error.code(), error.details(), trailers)).replace(id_, "ID")


@pytest.mark.parametrize(("owner", "other"), [("acme", "acme-2"), ("acme", ""), ("", "acme")])
@pytest.mark.parametrize("method", OF_ANOTHER_TENANT)
async def test_a_job_of_another_tenant_is_none(guarded: Guarded, method: str, owner: str, other: str) -> None:
    """It and one that does not exist are the same bytes, whoever has more scopes."""
    credentials = {"": guarded.all, **guarded.of_tenant}
    mine, theirs = bearer(credentials[other]), bearer(credentials[owner])
    job = new_job(model="idle")
    foreign = (await guarded.stub.Submit(llm_pb2.SubmitRequest(job=job), metadata=theirs)).workflow_id
    kind = type(REQUESTS[method]())
    match OF_ANOTHER_TENANT[method]:
        case "is not found":
            # All are as long: a message says how long the id in it is.
            missing = f"{foreign[:-1]}x"
            own_form = workflow_id("u", "x", other).ljust(len(foreign), "x")
            answers = [
                answer_of(await guarded.call(method, mine, kind(workflow_id=id_).SerializeToString()), id_)
                for id_ in (foreign, missing, own_form, foreign)
            ]
            assert len({*answers}) == 1
            assert "JOB_NOT_FOUND" in answers[0]
            assert "NOT_FOUND" in answers[0]
        case "is a job of its own":
            own = await guarded.stub.Submit(llm_pb2.SubmitRequest(job=job), metadata=mine)
            assert own.workflow_id != foreign
            # Another job under the same key: nobody is told that the key has been used elsewhere.
            again = await guarded.stub.Submit(llm_pb2.SubmitRequest(job=job), metadata=mine)
            assert again.run_id == own.run_id
        case "is not listed":
            request = llm_pb2.ListRequest(user_id=job.user_id)
            async with asyncio.timeout(PATIENCE):
                while not (await guarded.stub.List(request, metadata=theirs)).jobs:  # noqa: ASYNC110
                    await asyncio.sleep(0.1)
            assert not (await guarded.stub.List(request, metadata=mine)).jobs
        case "is a schedule of its own":
            request_ = schedule_pb2.CreateScheduleRequest(schedule=new_schedule(), paused=True)
            created = await guarded.schedules.CreateSchedule(request_, metadata=theirs)
            own_one = await guarded.schedules.CreateSchedule(request_, metadata=mine)
            assert own_one.status.schedule_id != created.status.schedule_id
        case "is no schedule" | "is no listed schedule":
            request_ = schedule_pb2.CreateScheduleRequest(schedule=new_schedule(), paused=True)
            scheduled = (await guarded.schedules.CreateSchedule(request_, metadata=theirs)).status.schedule_id
            if method == "ListSchedules":
                listing = schedule_pb2.ListSchedulesRequest(user_id=request_.schedule.user_id)
                async with asyncio.timeout(PATIENCE):
                    while not (await guarded.schedules.ListSchedules(listing, metadata=theirs)).schedules:  # noqa: ASYNC110
                        await asyncio.sleep(0.1)
                assert not (await guarded.schedules.ListSchedules(listing, metadata=mine)).schedules
            answers = []
            for id_ in (scheduled, f"{scheduled[:-1]}x") if method != "ListSchedules" else ():
                request = valid(method)
                request.schedule_id = id_
                answers.append(answer_of(await guarded.call(method, mine, request.SerializeToString()), id_))
            assert len({*answers}) <= 1
            assert all("SCHEDULE_NOT_FOUND" in answer for answer in answers)
        case "is a file of its own":
            key = new_file()
            own_file, their_file = [await upload(guarded.files(credentials[one]), key, b"x") for one in (other, owner)]
            assert own_file.ref.file_id != their_file.ref.file_id
        case "is no file" | "is no listed file":
            owners, others = guarded.files(credentials[owner]), guarded.files(credentials[other])
            file = await upload(owners, new_file(), b"x")
            id_ = file.ref.file_id
            if method == "ListFiles":
                await until(lambda: is_listed(owners, file))
                assert not await listed(others, user_id=file.user_id)
            else:
                answers = []
                for one in (id_, NO_FILE):
                    asked = about_file(method, one).SerializeToString()
                    answers.append(answer_of(await guarded.call(method, mine, asked), one))
                assert len({*answers}) == 1
                assert "FILE_NOT_FOUND" in answers[0]
            assert await get(owners, id_) == file
        case "is no batch" | "is no listed batch":
            theirs_ = guarded.batches(credentials[owner])
            created_ = await create(theirs_, lines_of(1))
            listing_ = batch_pb2.ListBatchesRequest(user_id=created_.user_id)
            if method == "ListBatches":
                async with asyncio.timeout(PATIENCE):
                    while not (await theirs_.batches.ListBatches(listing_)).batches:  # noqa: ASYNC110
                        await asyncio.sleep(0.1)
                assert not (await guarded.batches(credentials[other]).batches.ListBatches(listing_)).batches
            else:
                id_ = created_.batch_id
                own_form = batch_workflow_id("u", "x", other).ljust(len(id_), "x")
                answers = [
                    answer_of(await guarded.call(method, mine, kind(batch_id=one).SerializeToString()), one)
                    for one in (id_, f"{id_[:-1]}x", own_form, id_)
                ]
                assert len({*answers}) == 1
                assert "BATCH_NOT_FOUND" in answers[0]
            assert not (await theirs_.get(created_.batch_id)).cancel_requested
            await theirs_.cancel(created_.batch_id)
        case "is a pipeline of its own":
            refined = pipeline_pb2.SubmitPipelineRequest(pipeline=refinement())
            own_id, their_id = [
                (await guarded.pipelines(credentials[one]).SubmitPipeline(refined)).status.pipeline_id
                for one in (other, owner)
            ]
            assert own_id != their_id
        case "is no pipeline" | "is no listed pipeline":
            owner_ = guarded.pipelines(credentials[owner])
            refined = pipeline_pb2.SubmitPipelineRequest(pipeline=refinement())
            id_ = (await owner_.SubmitPipeline(refined)).status.pipeline_id
            listing__ = pipeline_pb2.ListPipelinesRequest(user_id=refined.pipeline.user_id)
            if method == "ListPipelines":
                async with asyncio.timeout(PATIENCE):
                    while not (await owner_.ListPipelines(listing__)).pipelines:  # noqa: ASYNC110
                        await asyncio.sleep(0.1)
                assert not (await guarded.pipelines(credentials[other]).ListPipelines(listing__)).pipelines
            else:
                own_form = pipeline_workflow_id("u", "x", other).ljust(len(id_), "x")
                answers = []
                for one in (id_, f"{id_[:-1]}x", own_form, id_):
                    asked_ = valid_pipeline(method)
                    asked_.pipeline_id = one
                    answers.append(answer_of(await guarded.call(method, mine, asked_.SerializeToString()), one))
                assert len({*answers}) == 1
                assert "PIPELINE_NOT_FOUND" in answers[0]
            about = pipeline_pb2.CancelPipelineRequest(pipeline_id=id_)
            found_ = await owner_.GetPipeline(pipeline_pb2.GetPipelineRequest(pipeline_id=id_))
            assert not found_.status.cancel_requested
            await owner_.CancelPipeline(about)
        case "is not counted":
            quota = await guarded.stub.GetQuota(llm_pb2.GetQuotaRequest(), metadata=mine)
            assert quota == llm_pb2.GetQuotaResponse(tenant=other, **({"weight": 1} if other else {}))
        case "is not deleted":
            started = await getattr(guarded.stub, method)(kind(user_id=job.user_id), metadata=mine)
            request_ = llm_pb2.GetDeletionRequest(deletion_id=started.deletion.deletion_id)
            async with asyncio.timeout(PATIENCE):
                while not (found := await guarded.stub.GetDeletion(request_, metadata=mine)).deletion.HasField(  # noqa: ASYNC110
                    "end_time"
                ):
                    await asyncio.sleep(0.1)
            assert found.deletion.deleted_jobs == 0
        case "has no deletion":
            deleted = llm_pb2.SubmitRequest(job=new_job(model="idle"))
            id_ = (await guarded.stub.Submit(deleted, metadata=theirs)).workflow_id
            deletion = (
                await guarded.stub.DeleteJob(llm_pb2.DeleteJobRequest(workflow_id=id_), metadata=theirs)
            ).deletion.deletion_id
            answers = [
                answer_of(await guarded.call(method, mine, kind(deletion_id=one).SerializeToString()), one)
                for one in (deletion, f"{deletion[:-1]}x")
            ]
            assert len({*answers}) == 1
            assert "DELETION_NOT_FOUND" in answers[0]
        case _:
            answers_ = [await guarded.stub.ListModels(llm_pb2.ListModelsRequest(), metadata=m) for m in (mine, theirs)]
            # The backlog changes from one call to the next.
            assert len({tuple(model.name for model in answer.models) for answer in answers_}) == 1
    status = (await guarded.stub.GetStatus(llm_pb2.GetStatusRequest(workflow_id=foreign), metadata=theirs)).status
    assert status.state == llm_pb2.JOB_STATE_QUEUED
    assert not status.cancel_requested
    await guarded.stub.Cancel(llm_pb2.CancelRequest(workflow_id=foreign), metadata=theirs)


def refinement() -> pipeline_pb2.PipelineRequest:
    """Return a new pipeline that comes along. No worker has its model, so it does not end."""
    job = new_job()
    refined = pipeline_pb2.PipelineRequest(user_id=job.user_id, request_id=job.request_id)
    refined.refine.topic = "rain"
    refined.refine.models.update(write="idle", critique="structured")
    return refined


async def is_listed(files: Any, file: file_pb2.File) -> bool:
    return await listed(files, user_id=file.user_id) == [file]


def about_file(method: str, file_id: str) -> Message:
    """Return a valid request of a method about a file."""
    if method == "CreateBatch":
        return batch_pb2.CreateBatchRequest(batch=batch(input={"file_id": file_id}))
    return type(REQUESTS[method]())(file_id=file_id)  # type: ignore[call-arg]


async def test_temporal_is_not_asked_about_another_tenants_job(stack: Stack, tmp_path: Path) -> None:
    """So the time of an answer tells nothing of it. Any call of Temporal's would wait for ever here."""
    made = Guarded(tmp_path)
    async with temporal_proxy(stack.address("temporal")) as (proxy, address):
        settings = {
            "GATEWAY_API_KEYS_FILE": str(made.file.path),
            "GATEWAY_ROLE": "api",
            "TEMPORAL_ADDRESS": address,
        }
        async with running(stack, settings) as (channel, _):
            acme = bearer(made.of_tenant["acme"])
            job = llm_pb2.SubmitRequest(job=new_job(model="idle"))
            foreign = (await LlmServiceStub(channel).Submit(job, metadata=acme)).workflow_id
            of_jobs = ("DescribeWorkflowExecution", "QueryWorkflow", "SignalWorkflowExecution")
            proxy.silent.update(of_jobs)
            proxy.peaks.clear()
            for method in sorted(FINDS_NOTHING):
                data = type(REQUESTS[method]())(workflow_id=foreign).SerializeToString()  # type: ignore[call-arg]
                for credential in (made.of_tenant["acme-2"], made.all):
                    error = await call(channel, method, bearer(credential), data)
                    assert reason_of(error) == ("NOT_FOUND", "JOB_NOT_FOUND"), method
            assert not proxy.peaks.keys() & {*of_jobs}
            proxy.silent.clear()


async def test_two_users_keys_watch_at_once(guarded: Guarded, stub: LlmServiceStub) -> None:
    """A watch is shared, the right to see it is not: who may not, neither sees nor ends it. GetJob is the same."""
    job = new_job(model="idle")
    owner, other = guarded.file.add(ALL, user_id=job.user_id), guarded.file.add(ALL, user_id="somebody-else")
    await guarded.until_accepted(other)
    id_ = (await stub.Submit(llm_pb2.SubmitRequest(job=job))).workflow_id
    request = llm_pb2.StreamStatusRequest(workflow_id=id_)
    of_job = llm_pb2.GetJobRequest(workflow_id=id_)
    assert (await guarded.stub.GetJob(of_job, metadata=bearer(owner))).job == job
    with pytest.raises(grpc.aio.AioRpcError) as error:
        await guarded.stub.GetJob(of_job, metadata=bearer(other))
    assert reason_of(error.value) == ("NOT_FOUND", "JOB_NOT_FOUND")
    foreign = [guarded.stub.StreamStatus(request, metadata=bearer(other)) for _ in range(5)]
    own = [guarded.stub.StreamStatus(request, metadata=bearer(owner)) for _ in range(5)]
    for stream in own:
        assert (await stream.read()).status.workflow_id == id_
    for stream in foreign:
        with pytest.raises(grpc.aio.AioRpcError) as error:
            await stream.read()
        assert reason_of(error.value) == ("NOT_FOUND", "JOB_NOT_FOUND")
    for stream in own:
        assert (await stream.read()) is not grpc.aio.EOF
        stream.cancel()


async def test_other_clients_send_a_key(guarded: Guarded) -> None:
    """buf, as people do, by reflection; and the Python client, which says what is wrong with one."""
    url = f"http://{guarded.address}/{SERVICE.full_name}/ListModels"
    options = ("--protocol", "grpc", "--http2-prior-knowledge", "--data", "{}")
    header = ("-H", f"authorization: Bearer {guarded.all}")
    ended = await run(tool("buf"), "curl", *options, *header, url)
    assert "docstrings" in ended.output, ended.errors
    ended = await run(tool("buf"), "curl", *options, url)
    assert "unauthenticated" in ended.errors
    async with AsyncClient(guarded.address, metadata=dict(bearer(guarded.all))) as client:
        assert await client.models()
    async with AsyncClient(guarded.address, metadata=dict(bearer(guarded.revoked))) as client:
        with pytest.raises(CredentialInvalid, match="revoked"):
            await client.models()


async def test_health_needs_no_credential_and_reflection_is_a_setting(stack: Stack, guarded: Guarded) -> None:
    health = health_pb2_grpc.HealthStub(guarded.channel)
    assert (await health.Check(health_pb2.HealthCheckRequest())).status == health_pb2.HealthCheckResponse.SERVING
    ask = reflection_pb2.ServerReflectionRequest(list_services="")
    answer = await reflection_pb2_grpc.ServerReflectionStub(guarded.channel).ServerReflectionInfo(iter([ask])).read()
    assert answer.list_services_response.service
    gateway = stack.add("gateway")
    del gateway.environment["GATEWAY_REFLECTION"]
    await gateway.start()
    await gateway.wait_ready()
    async with grpc.aio.insecure_channel(stack.address(gateway.name)) as channel:
        with pytest.raises(grpc.aio.AioRpcError) as error:
            # Without a request: one that is written while the call is refused fails as INTERNAL now and then.
            await reflection_pb2_grpc.ServerReflectionStub(channel).ServerReflectionInfo().read()
        assert error.value.code() == grpc.StatusCode.UNIMPLEMENTED
    await gateway.terminate()


async def test_an_issuer_that_is_away_shuts_nobody_out(stack: Stack, tmp_path: Path) -> None:
    """Tokens of known keys count; of an unknown one nobody can tell, until the issuer is back. A flood of them asks
    it once."""
    issuer = Issuer("old", "new")
    server = KeySetServer(issuer.key_set("old"))
    old, new = bearer(issuer.token("old", ALL)), bearer(issuer.token("new", ALL))
    made = Guarded(tmp_path)
    with server.serving() as url:
        async with running(stack, made.settings(url)) as (channel, _):
            assert await call(channel, "ListModels", old) is None
            asked = server.asked
            errors = await asyncio.gather(*(call(channel, "ListModels", new) for _ in range(50)))
            assert {reason_of(error) for error in errors} == {INVALID}
            assert server.asked == asked + 1
    server.data = issuer.key_set()
    async with running(stack, made.settings(url)) as (channel, gateway):
        away = ("UNAVAILABLE", "AUTHENTICATION_UNAVAILABLE")
        assert reason_of(await call(channel, "ListModels", old)) == away
        assert "keys of JWTs" in gateway.log
        assert await call(channel, "ListModels", bearer(made.all)) is None
        with server.serving():
            async with asyncio.timeout(PATIENCE):
                while await call(channel, "ListModels", new) is not None:  # noqa: ASYNC110
                    await asyncio.sleep(0.2)
        assert await call(channel, "ListModels", old) is None


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"GATEWAY_HOST": "0.0.0.0"}, ["GATEWAY_API_KEYS_FILE", "GATEWAY_JWT_ISSUER", "GATEWAY_ALLOW_ANONYMOUS=true"]),
        ({"GATEWAY_HOST": "::"}, ["GATEWAY_ALLOW_ANONYMOUS=true"]),
        ({"GATEWAY_JWT_ISSUER": ISSUER}, ["GATEWAY_JWT_AUDIENCE and GATEWAY_JWT_KEYS"]),
        ({"GATEWAY_JWT_KEYS": "http://issuer.test/keys"}, ["GATEWAY_JWT_KEYS", "https"]),
        ({"GATEWAY_JWT_ALGORITHMS": '["HS256"]'}, ["GATEWAY_JWT_ALGORITHMS"]),
        ({"GATEWAY_JWT_ALGORITHMS": '["none"]'}, ["GATEWAY_JWT_ALGORITHMS"]),
        ({"GATEWAY_API_KEYS_FILE": "/nowhere/keys.json"}, ["GATEWAY_API_KEYS_FILE: ", "/nowhere/keys.json cannot be"]),
        (
            {"GATEWAY_CLIENT_CERTIFICATES": '[{"pattern": "(?P<tenant>.+)", "scopes": ["jobs:read"], "tenant": "a"}]'},
            ["GATEWAY_CLIENT_CERTIFICATES", "not from both"],
        ),
        (
            {"GATEWAY_TENANTS": '{"a/b": {"weight": 2}}'},
            ["GATEWAY_TENANTS", "a tenant has 1 to 32 of"],
        ),
        (
            {"GATEWAY_CLIENT_CERTIFICATES": '[{"pattern": "spiffe://a/b", "scopes": ["jobs:raed"]}]'},
            ["GATEWAY_CLIENT_CERTIFICATES", "jobs:raed"],
        ),
        (
            {"GATEWAY_CLIENT_CERTIFICATES": '[{"pattern": "spiffe://a/b", "scopes": ["jobs:read"]}]'},
            ["GATEWAY_CLIENT_CERTIFICATES needs GATEWAY_TLS_CLIENT_CA"],
        ),
    ],
)
async def test_a_gateway_that_would_let_in_anybody_does_not_start(
    stack: Stack, settings: dict[str, str], says: list[str]
) -> None:
    """And says what is missing."""
    gateway = stack.add("gateway", settings)
    await gateway.start()
    async with asyncio.timeout(PATIENCE):
        assert await gateway.wait() == 1
    for words in says:
        assert words in gateway.log


async def test_a_key_of_a_tenant_that_cannot_be_is_refused_at_the_start(stack: Stack, tmp_path: Path) -> None:
    made = Guarded(tmp_path)
    keys = json.loads(made.file.path.read_text())
    keys[0]["tenant"] = "acme/2"
    made.file.path.write_text(json.dumps(keys))
    gateway = stack.add("gateway", {"GATEWAY_API_KEYS_FILE": str(made.file.path)})
    await gateway.start()
    async with asyncio.timeout(PATIENCE):
        assert await gateway.wait() == 1
    assert "0.tenant" in gateway.log
    assert "a tenant has 1 to 32 of" in gateway.log
    assert keys[0]["sha256"] not in gateway.log


async def test_an_operator_may_let_in_anybody(stack: Stack) -> None:
    """Behind a proxy that knows the callers."""
    settings = {"GATEWAY_HOST": "0.0.0.0", "GATEWAY_ALLOW_ANONYMOUS": "true"}
    async with running(stack, settings) as (channel, _):
        assert await call(channel, "ListModels", ()) is None


async def test_a_credential_does_not_matter_where_none_is_asked_for(stack: Stack) -> None:
    """A client that sends one to an installation without authentication is served as before."""
    async with grpc.aio.insecure_channel(stack.address("gateway")) as channel:
        assert await call(channel, "ListModels", bearer("whatever")) is None
