"""The audit log: one record for each call, before the answer of a write, and no write without one."""

import asyncio
import json
import uuid
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import nats
import pytest
from nats.js.api import StreamConfig
from temporalio.client import Client

from deploy.local.process import Process
from deploy.local.stack import Stack
from llm_pb import llm_pb2
from llm_pb.llm_pb2_grpc import LlmServiceStub
from services.gateway import scopes
from services.gateway.auditing import WRITES
from tests.stack.test_authentication import METHODS, NO_JOB, REQUESTS, call, reason_of
from tests.support.credentials import KeyFile, bearer, id_of
from tests.support.jobs import new_job
from tests.support.readiness import ask
from tests.support.scrapes import scrape_until

PATIENCE = 60
UNAVAILABLE = ("UNAVAILABLE", "AUDIT_UNAVAILABLE")


@asynccontextmanager
async def audited(stack: Stack, place: Any, **settings: str) -> AsyncIterator[tuple[grpc.aio.Channel, Process]]:
    gateway = stack.add("gateway", {"GATEWAY_AUDIT": str(place), **settings})
    await gateway.start()
    await gateway.wait_ready()
    async with grpc.aio.insecure_channel(stack.address(gateway.name)) as channel:
        yield channel, gateway
    await gateway.terminate()


def read(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text().splitlines() if line]


async def until_records(path: Path, count: int) -> list[dict[str, str]]:
    """Return the records once there are so many: those of reads come soon after the answer."""
    async with asyncio.timeout(PATIENCE):
        while len(records := read(path)) < count:  # noqa: ASYNC110
            await asyncio.sleep(0.05)
    return records


@pytest.mark.parametrize("allowed", [True, False], ids=["allowed", "refused"])
async def test_every_call_has_one_record(stack: Stack, tmp_path: Path, allowed: bool) -> None:
    """Of every method; and whatever it says of the request, it holds nothing but ids."""
    keys, log = KeyFile(tmp_path / "keys.json"), tmp_path / "audit.jsonl"
    right = keys.add(scopes.SCOPES)
    async with audited(stack, log, GATEWAY_API_KEYS_FILE=str(keys.path)) as (channel, _):
        for number, method in enumerate(REQUESTS):
            error = await call(channel, method, bearer(right) if allowed else bearer("llmk_x_y"))
            if method in WRITES or not allowed:
                # Before the answer.
                assert len(read(log)) == number + 1
            record = (await until_records(log, number + 1))[-1]
            assert record["method"] == method
            assert record["peer"].startswith("ipv4:127.0.0.1:")
            assert record["time"]
            if error is None:
                assert record["decision"] == "allowed"
            else:
                assert (record["decision"], record["code"], record["reason"]) == ("refused", *reason_of(error))
            if allowed:
                assert record["key_id"] == id_of(right)
                if "Schedule" in method:
                    assert ("schedule" in record) == (method != "ListSchedules")
                    assert "job" not in record
                    continue
                field = "deletion" if method == "GetDeletion" else "job"
                has_id = "workflow_id" in METHODS[method].input_type.fields_by_name
                starts = ("Submit", "CreateBatch", "SubmitPipeline")
                ids = {*METHODS[method].input_type.fields_by_name.keys()} & {"workflow_id", "batch_id", "pipeline_id"}
                assert (field in record) == (bool(ids) or method in (*starts, "GetDeletion")), method
                if has_id:
                    assert record["job"] == NO_JOB
            else:
                assert record["reason"] == "CREDENTIAL_INVALID"
                assert "job" not in record
    records = read(log)
    assert Counter(record["method"] for record in records) == dict.fromkeys(REQUESTS, 1)
    text = log.read_text()
    assert right.split("_")[2] not in text
    assert "Say something" not in text


async def test_a_record_says_who_and_what(stack: Stack, stub: LlmServiceStub, tmp_path: Path) -> None:
    """Of scopes that are missing, of users that are not the caller's, of a write that found nothing."""
    keys, log = KeyFile(tmp_path / "keys.json"), tmp_path / "audit.jsonl"
    job = new_job(f"marker{uuid.uuid4().hex}", model="idle")
    reader, bound = keys.add(["jobs:read"]), keys.add(scopes.SCOPES, user_id=job.user_id)
    others = (await stub.Submit(llm_pb2.SubmitRequest(job=new_job(model="idle")))).workflow_id
    trace = "4bf92f3577b34da6a3ce929d0e0e4736"
    async with audited(stack, log, GATEWAY_API_KEYS_FILE=str(keys.path)) as (channel, _):
        guarded = LlmServiceStub(channel)
        parent = ("traceparent", f"00-{trace}-00f067aa0ba902b7-01")
        answer = await guarded.Submit(llm_pb2.SubmitRequest(job=job), metadata=(*bearer(bound), parent))
        assert await call(channel, "Cancel", bearer(reader))
        foreign = llm_pb2.CancelRequest(workflow_id=others).SerializeToString()
        assert await call(channel, "Cancel", bearer(bound), foreign)
        not_mine = llm_pb2.DeleteJobsRequest(user_id="somebody-else").SerializeToString()
        assert await call(channel, "DeleteJobs", bearer(bound), not_mine)
        garbage = llm_pb2.CancelRequest(workflow_id=job.prompt + " '").SerializeToString()
        assert await call(channel, "Cancel", bearer(bound), garbage)
        stream = guarded.StreamStatus(
            llm_pb2.StreamStatusRequest(workflow_id=answer.workflow_id), metadata=bearer(bound)
        )
        await stream.read()
        mine = llm_pb2.DeleteJobsRequest(user_id=job.user_id)
        deletion = (await guarded.DeleteJobs(mine, metadata=bearer(bound))).deletion.deletion_id
        records = await until_records(log, 7)
        stream.cancel()
    submitted, scope, foreign_job, user, bad, streamed, deleted = records
    assert submitted["decision"] == "allowed"
    assert (submitted["job"], submitted["user_id"]) == (answer.workflow_id, job.user_id)
    assert submitted["key_id"] == id_of(bound)
    assert submitted["trace_id"] == trace
    assert (scope["reason"], scope["key_id"]) == ("MISSING_SCOPE", id_of(reader))
    assert (foreign_job["decision"], foreign_job["reason"], foreign_job["job"]) == ("refused", "JOB_NOT_FOUND", others)
    assert (user["reason"], user["user_id"]) == ("USER_NOT_ALLOWED", "somebody-else")
    assert (bad["reason"], "job" in bad) == ("INVALID_REQUEST", False)
    assert (streamed["method"], streamed["decision"]) == ("StreamStatus", "allowed")
    assert (deleted["decision"], deleted["deletion"]) == ("allowed", deletion)
    # The end of the stream is no second decision.
    assert len(read(log)) == 7
    assert job.prompt not in log.read_text()


async def test_a_full_disk_stops_writes_and_no_reads(stack: Stack, temporal: Client) -> None:
    """/dev/full takes no byte, as a full disk."""
    async with audited(stack, "/dev/full") as (channel, gateway):
        assert not (await ask(stack, gateway.name, "/readyz")).body["degraded"]
        job = new_job(model="idle")
        for method in REQUESTS:
            data = llm_pb2.SubmitRequest(job=job).SerializeToString() if method == "Submit" else None
            error = await call(channel, method, (), data)
            # Of the other writes each finds first that there is no such job, or that the log is known to be full.
            refused = error is not None and reason_of(error) == UNAVAILABLE
            reaches = method in ("Submit", "DeleteJobs", "CreateSchedule")
            assert refused if reaches else method in WRITES or not refused, method
            # No gateway knows the pipeline of the request.
            otherwise = "INVALID_ARGUMENT" if method == "SubmitPipeline" else "NOT_FOUND"
            assert error is None or refused or error.code().name == otherwise, method
        ready = await ask(stack, gateway.name, "/readyz")
        assert (ready.status, set(ready.body["degraded"])) == (200, {"audit"})
        # Nothing was done.
        with pytest.raises(grpc.aio.AioRpcError) as unknown:
            await LlmServiceStub(channel).GetStatus(
                llm_pb2.GetStatusRequest(workflow_id=f"llmjob-{job.user_id.replace('-', '--')}-{job.request_id}")
            )
        assert unknown.value.code() == grpc.StatusCode.NOT_FOUND
        lost = len(REQUESTS)
        await scrape_until(stack, lambda found: found.total("llm_audit_lost_total") >= lost, gateway.name)


async def test_a_write_about_a_job_that_exists_is_not_done_either(stack: Stack, stub: LlmServiceStub) -> None:
    id_ = (await stub.Submit(llm_pb2.SubmitRequest(job=new_job(model="idle")))).workflow_id
    async with audited(stack, "/dev/full") as (channel, _):
        for method, kind in (("Cancel", llm_pb2.CancelRequest), ("DeleteJob", llm_pb2.DeleteJobRequest)):
            error = await call(channel, method, (), kind(workflow_id=id_).SerializeToString())
            assert reason_of(error) == UNAVAILABLE
    status = (await stub.GetStatus(llm_pb2.GetStatusRequest(workflow_id=id_))).status
    assert status.state == llm_pb2.JOB_STATE_QUEUED
    assert not status.cancel_requested


async def test_writes_that_cannot_be_recorded_use_up_no_quota(stack: Stack, tmp_path: Path) -> None:
    """But the first one, whose slot is free again after a minute: nobody knew."""
    keys = KeyFile(tmp_path / "keys.json")
    tenant = f"audited-{uuid.uuid4().hex[:8]}"
    metadata = bearer(keys.add(scopes.SCOPES, tenant=tenant))
    tenants = json.dumps({tenant: {"max_open_jobs": 2}})
    settings = {"GATEWAY_API_KEYS_FILE": str(keys.path), "GATEWAY_TENANTS": tenants}
    async with audited(stack, "/dev/full", **settings) as (channel, _):
        stub = LlmServiceStub(channel)
        for _ in range(4):
            with pytest.raises(grpc.aio.AioRpcError) as error:
                await stub.Submit(llm_pb2.SubmitRequest(job=new_job(model="idle")), metadata=metadata, timeout=PATIENCE)
            assert reason_of(error.value) == UNAVAILABLE
        quota = await stub.GetQuota(llm_pb2.GetQuotaRequest(), metadata=metadata, timeout=PATIENCE)
        assert quota.open_jobs.used <= 1


async def test_a_file_that_was_moved_is_made_anew(stack: Stack, tmp_path: Path) -> None:
    """As logrotate does. A line that a kill has cut does not spoil the next one."""
    log, moved = tmp_path / "audit.jsonl", tmp_path / "audit.jsonl.1"
    log.write_text('{"time": "cut in the mid')
    async with audited(stack, log) as (channel, _):
        assert await call(channel, "Submit", ()) is None
        log.rename(moved)
        assert await call(channel, "Submit", ()) is None
    cut, first = moved.read_text().splitlines()
    assert cut == '{"time": "cut in the mid'
    assert json.loads(first)["method"] == "Submit"
    (second,) = read(log)
    assert second["method"] == "Submit"
    assert second["job"] != json.loads(first)["job"]
    assert log.stat().st_mode & 0o007 == 0


async def test_records_that_wait_are_stored_at_the_end(stack: Stack, tmp_path: Path) -> None:
    log = tmp_path / "audit.jsonl"
    async with audited(stack, log) as (channel, gateway):
        await asyncio.gather(*(call(channel, "ListModels", ()) for _ in range(200)))
        await gateway.terminate()
    assert len(read(log)) == 200


async def test_no_accepted_job_is_without_its_record(stack: Stack, temporal: Client, tmp_path: Path) -> None:
    """Whenever the gateway is killed."""
    log = tmp_path / "audit.jsonl"
    user = f"audited-{uuid.uuid4().hex[:8]}"
    gateway = stack.add("gateway", {"GATEWAY_AUDIT": str(log)})
    for _ in range(3):
        await gateway.start()
        await gateway.wait_ready()
        async with grpc.aio.insecure_channel(stack.address(gateway.name)) as channel:
            stub = LlmServiceStub(channel)

            async def submit(stub: LlmServiceStub = stub) -> None:
                job = new_job(user_id=user, request_id=uuid.uuid4().hex, model="idle")
                await stub.Submit(llm_pb2.SubmitRequest(job=job), timeout=PATIENCE)

            submits = [asyncio.create_task(submit()) for _ in range(60)]
            await asyncio.wait(submits, return_when=asyncio.FIRST_COMPLETED)
            await gateway.kill()
            await asyncio.gather(*submits, return_exceptions=True)
    recorded = {
        record["job"]
        for line in log.read_text().splitlines()
        if line.endswith("}") and (record := json.loads(line))["decision"] == "allowed"
    }
    async with asyncio.timeout(PATIENCE):
        while not (jobs := {item.id async for item in temporal.list_workflows(f"UserID = '{user}'")}):  # noqa: ASYNC110
            await asyncio.sleep(0.2)
    assert jobs <= recorded


async def test_a_log_that_cannot_be_opened_ends_the_gateway(stack: Stack, tmp_path: Path) -> None:
    gateway = stack.add("gateway", {"GATEWAY_AUDIT": str(tmp_path / "nowhere" / "audit.jsonl")})
    await gateway.start()
    async with asyncio.timeout(PATIENCE):
        assert await gateway.wait() == 1
    assert "audit log" in gateway.log


async def test_a_stream_keeps_what_it_has(stack: Stack) -> None:
    """The records of a JetStream stream can be neither deleted nor purged. Without its broker no write is done."""
    name = f"AUDIT_{uuid.uuid4().hex[:8]}"
    async with audited(stack, f"nats://{stack.address('nats')}/{name}") as (channel, _):
        await _until_accepted(channel)
        connection = await nats.connect(f"nats://{stack.address('nats')}")
        jetstream = connection.jetstream()
        message = await jetstream.get_msg(name, 1)
        assert json.loads(message.data or b"")["method"] == "Submit"
        with pytest.raises(nats.js.errors.APIError):
            await jetstream.purge_stream(name)
        with pytest.raises(nats.js.errors.APIError):
            await jetstream.delete_msg(name, 1)
        await connection.close()
    async with audited(stack, f"nats://127.0.0.1:9/{name}") as (channel, _):
        assert reason_of(await call(channel, "Submit", ())) == UNAVAILABLE
        assert await call(channel, "ListModels", ()) is None


async def test_a_deleted_stream_is_created_again(stack: Stack) -> None:
    """Without a restart. The log tells that its records are gone."""
    name = f"AUDIT_{uuid.uuid4().hex[:8]}"
    async with audited(stack, f"nats://{stack.address('nats')}/{name}") as (channel, gateway):
        await _until_accepted(channel)
        connection = await nats.connect(f"nats://{stack.address('nats')}")
        await connection.jetstream().delete_stream(name)
        assert reason_of(await call(channel, "Submit", ())) == UNAVAILABLE
        await _until_accepted(channel)
        assert (await connection.jetstream().stream_info(name)).config.deny_purge
        assert f"{name} is gone, with its records" in gateway.log
        await connection.close()


async def _until_accepted(channel: grpc.aio.Channel) -> None:
    async with asyncio.timeout(PATIENCE):
        while (error := await call(channel, "Submit", ())) is not None:
            assert reason_of(error) == UNAVAILABLE
            await asyncio.sleep(0.1)


async def test_a_stream_that_may_be_purged_is_refused(stack: Stack) -> None:
    name = f"AUDIT_{uuid.uuid4().hex[:8]}"
    connection = await nats.connect(f"nats://{stack.address('nats')}")
    await connection.jetstream().add_stream(StreamConfig(name=name, subjects=[f"llm.audit.{name}"]))
    async with audited(stack, f"nats://{stack.address('nats')}/{name}") as (channel, gateway):
        assert reason_of(await call(channel, "Submit", ())) == UNAVAILABLE
        async with asyncio.timeout(PATIENCE):
            while "deny deletes and purges" not in gateway.log:  # noqa: ASYNC110
                await asyncio.sleep(0.1)
    await connection.close()
