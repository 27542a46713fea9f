"""Metrics of real processes after real jobs agree with the jobs and follow the conventions."""

import asyncio
import re
from collections import Counter
from collections.abc import AsyncIterator

import grpc
import pytest

from deploy.local.stack import Stack
from llm_pb import llm_pb2
from llm_pb.llm_pb2_grpc import LlmServiceStub
from tests.support.jobs import new_job, run_job, watch, webhook
from tests.support.paths import ROOT
from tests.support.receivers import Receiver, status
from tests.support.scrapes import OURS, SERVICES, TEMPORALS, Scrape, measured_stack, scrape, scrape_until

SETTLED = {
    ("docstrings", "succeeded", ""): 4,
    ("docstrings", "failed", "OUT_OF_MEMORY"): 1,
    ("structured", "failed", "UNKNOWN_MODEL"): 1,
    ("docstrings", "cancelled", "CANCELLED"): 2,
    ("idle", "cancelled", "CANCELLED"): 1,
    ("idle", "timed_out", "QUEUE_TIMEOUT"): 1,
    ("docstrings", "timed_out", "RUN_TIMEOUT"): 1,
    ("_OTHER", "succeeded", ""): 1,
    ("_OTHER", "failed", "INVALID_JOB"): 1,
}
"""Number of jobs of tests.support.scrapes.measured_stack by model, state and reason."""
PAGE = ROOT / "docs" / "observe.md"
TENANTS = '{"acme": {"max_open_jobs": 2}}'


@pytest.fixture(scope="module")
async def measured(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Stack]:
    async with measured_stack(tmp_path_factory.mktemp("metrics"), GATEWAY_TENANTS=TENANTS) as stack:
        yield stack


@pytest.fixture(scope="module")
async def client(measured: Stack) -> AsyncIterator[LlmServiceStub]:
    async with grpc.aio.insecure_channel(measured.address("gateway")) as channel:
        yield LlmServiceStub(channel)


@pytest.fixture(scope="module")
async def after_all(measured: Stack) -> Scrape:
    """Scrape the stack after the jobs of every outcome."""
    jobs = sum(SETTLED.values())
    return await scrape_until(
        measured,
        lambda found: found.total("llm_job_duration_seconds_count") >= jobs and found.total("llm_gateway_watches") == 0,
    )


async def test_finished_jobs_are_counted_once_by_model_state_and_reason(after_all: Scrape) -> None:
    """A model name that no gateway has checked does not become a label value."""
    labels = ("gen_ai_request_model", "llm_job_state", "error_type")
    assert after_all.by("llm_job_duration_seconds_count", *labels) == SETTLED


async def test_submitted_jobs_are_counted_by_model(after_all: Scrape) -> None:
    """Only jobs that a gateway started count. Two of the others were started by hand."""
    assert after_all.by("llm_job_submitted_total", "gen_ai_request_model") == {
        ("docstrings",): 8,
        ("structured",): 1,
        ("idle",): 2,
    }


async def test_cancels_are_timed(after_all: Scrape) -> None:
    """Three jobs were cancelled."""
    assert after_all.total("llm_job_cancel_duration_seconds_count") == 3
    assert after_all.total("llm_job_cancel_duration_seconds_sum") > 0


async def test_attempts_are_counted_by_what_became_of_them(after_all: Scrape) -> None:
    """A job's queue time is counted once. Attempts after the first count as continuations."""
    assert after_all.total("llm_job_queue_duration_seconds_count") == 10
    generations = after_all.by("gen_ai_server_request_duration_seconds_count", "error_type")
    assert generations[("",)] == 5
    assert generations[("OUT_OF_MEMORY",)] == 3
    assert generations[("ENGINE_FAILED",)] == 1
    assert after_all.total("llm_job_continuations_total") > 0
    assert after_all.total("llm_job_rewinds_total") == 0


async def test_deliveries_are_counted_by_outcome(
    after_all: Scrape, receiver: Receiver, client: LlmServiceStub, measured: Stack
) -> None:
    """Attempts at unserved targets fail. Then one target accepts the event, and one refuses it for good."""
    name, labels = "llm_notification_attempt_duration_seconds_count", ("llm_notification_target", "error_type")
    (only,) = after_all.by(name, *labels)
    assert only == ("webhook", "DELIVERY_FAILED")
    targets = [*webhook(f"{receiver.url}/metrics"), *webhook(receiver.on("/metrics/gone", status(410)))]
    await run_job(client, new_job(params={"max_tokens": 1}, notify=targets))
    found = (await scrape(measured, "notifier")).by(name, *labels)
    assert min(found["webhook", ""], found["webhook", "DELIVERY_REFUSED"]) >= 1


async def test_tokens_agree_with_the_results(measured: Stack, client: LlmServiceStub) -> None:
    """They count during the generation and at its end. The times of the tokens add up to the generation's."""
    # An attempt that timed out continues for a moment after its job has ended.
    before = await scrape_until(measured, lambda found: found.total("llm_engine_requests") == 0, "gpu-worker")
    seen = [await run_job(client, new_job(text, params={"max_tokens": 30})) for text in ("One.", "And two.")]
    after = await scrape(measured, "gpu-worker")
    usage = [one.final.result.metadata for one in seen]
    for kind, tokens in {
        "input": sum(metadata.prompt_tokens for metadata in usage),
        "output": sum(metadata.output_tokens for metadata in usage),
    }.items():
        for name in ("llm_engine_tokens_total", "gen_ai_client_token_usage_sum"):
            labels = {"gen_ai_token_type": kind}
            assert after.total(name, **labels) - before.total(name, **labels) == tokens

    def made(name: str) -> float:
        return after.total(name) - before.total(name)

    assert made("gen_ai_server_time_to_first_token_seconds_count") == 2
    assert made("gen_ai_server_time_per_output_token_seconds_count") == 2
    took = made("gen_ai_server_request_duration_seconds_sum")
    first, each = (made(f"gen_ai_server_time_{name}_seconds_sum") for name in ("to_first_token", "per_output_token"))
    assert 29 * 2 / 200 * 0.5 < first + 29 * each < took + 0.1
    assert each / 2 > 0.5 / 200, "the simulated engine generates at most 200 tokens/s"


async def test_the_engine_shows_what_it_runs(measured: Stack, client: LlmServiceStub) -> None:
    """The gauges count a running job with two watchers, and return to zero after its end."""
    id_ = (await client.Submit(llm_pb2.SubmitRequest(job=new_job(params={"max_tokens": 4000})))).workflow_id
    watching = [asyncio.create_task(watch(client, id_)) for _ in range(2)]
    running = {"llm_engine_request_state": "running"}
    during = await scrape_until(
        measured,
        lambda found: found.total("llm_gateway_watchers") == 2 and found.total("llm_engine_requests", **running) == 1,
    )
    assert during.total("llm_engine_capacity") == 64
    assert 0 < during.total("llm_engine_kv_cache_usage_ratio") < 1
    assert during.total("llm_gateway_watches") == 1
    await client.Cancel(llm_pb2.CancelRequest(workflow_id=id_))
    await asyncio.gather(*watching)
    after = await scrape_until(measured, lambda found: found.total("llm_gateway_watchers") == 0)
    assert after.total("llm_engine_requests") == after.total("llm_engine_kv_cache_usage_ratio") == 0
    assert after.total("llm_gateway_watches") == 0


async def test_the_feeds_lag_is_that_of_what_comes(measured: Stack, client: LlmServiceStub) -> None:
    """Reports that were in the feed before a watch began do not count as late."""
    id_ = (await client.Submit(llm_pb2.SubmitRequest(job=new_job(params={"max_tokens": 800})))).workflow_id
    await watch(client, id_)
    found = await scrape(measured, "gateway")
    count = found.total("llm_gateway_feed_lag_seconds_count")
    assert count > 10
    # The job took 4 s and was watched from its start.
    assert found.total("llm_gateway_feed_lag_seconds_sum") / count < 2


async def test_calls_are_counted_by_how_they_ended(measured: Stack, client: LlmServiceStub) -> None:
    """Calls and streams count as answers, refusals, deadlines and cancels. An unknown method adds no label value."""
    id_ = (await client.Submit(llm_pb2.SubmitRequest(job=new_job(model="idle")))).workflow_id
    watched = llm_pb2.StreamStatusRequest(workflow_id=id_)
    before = await scrape(measured, "gateway")
    await client.GetStatus(llm_pb2.GetStatusRequest(workflow_id=id_))
    with pytest.raises(grpc.aio.AioRpcError):
        await client.GetStatus(llm_pb2.GetStatusRequest(workflow_id="llmjob-no-such"))
    with pytest.raises(grpc.aio.AioRpcError):
        await client.Submit(llm_pb2.SubmitRequest())
    with pytest.raises(grpc.aio.AioRpcError):
        async for _ in client.StreamStatus(watched, timeout=0.5):
            pass
    call = client.StreamStatus(watched)
    await call.read()
    call.cancel()
    await client.Cancel(llm_pb2.CancelRequest(workflow_id=id_))
    await watch(client, id_)
    async with grpc.aio.insecure_channel(measured.address("gateway")) as channel:
        with pytest.raises(grpc.aio.AioRpcError):
            await channel.unary_unary("/llm.v1.LlmService/MadeUp")(b"")

    def counted(found: Scrape) -> dict[tuple[str, ...], float]:
        labels = ("rpc_method", "rpc_response_status_code", "error_type")
        now, then = (one.by("rpc_server_call_duration_seconds_count", *labels) for one in (found, before))
        return {
            (method.removeprefix("llm.v1.LlmService/"), *rest): count - then.get((method, *rest), 0)
            for (method, *rest), count in now.items()
            if method.startswith("llm.") and count != then.get((method, *rest), 0)
        }

    expected = {
        ("GetStatus", "OK", ""): 1,
        ("GetStatus", "NOT_FOUND", ""): 1,
        ("Submit", "INVALID_ARGUMENT", ""): 1,
        ("StreamStatus", "DEADLINE_EXCEEDED", "DEADLINE_EXCEEDED"): 1,
        ("StreamStatus", "CANCELLED", ""): 1,
        ("StreamStatus", "OK", ""): 1,
        ("Cancel", "OK", ""): 1,
    }
    found = await scrape_until(measured, lambda found: sum(counted(found).values()) >= len(expected), "gateway")
    assert counted(found) == expected


async def test_more_jobs_make_no_more_series(measured: Stack, client: LlmServiceStub) -> None:
    """Label values are bounded: none contains a user or a job."""

    async def twenty(word: str) -> None:
        jobs = [
            new_job(
                f"{word}-prompt",
                user_id=f"{word}-{n}",
                request_id=f"{word}-r",
                project_id=f"{word}-p",
                params={"max_tokens": 2},
            )
            for n in range(20)
        ]
        await asyncio.gather(*(run_job(client, job) for job in jobs))

    def series(found: Scrape) -> set[tuple[str, tuple[tuple[str, str], ...]]]:
        return {(sample.name, tuple(sorted(sample.labels.items()))) for sample in found.samples}

    await twenty("warmup")
    before = await scrape(measured)
    done = before.total("llm_job_duration_seconds_count") + 20
    await twenty("unbounded")
    after = await scrape_until(measured, lambda found: found.total("llm_job_duration_seconds_count") >= done)
    new = {(name, labels) for name, labels in series(after) - series(before) if not name.startswith("python_gc")}
    # Temporal's SDK may make a call of a new kind at any moment.
    assert not {name for name, _ in new if not name.startswith("temporal_")}
    values = {value for sample in after.samples for value in sample.labels.values()}
    assert not [value for value in values if re.search(r"unbounded|warmup|llmjob-|[0-9a-f]{8}-[0-9a-f]{4}-", value)]


async def test_names_and_units_follow_the_conventions(after_all: Scrape) -> None:
    """Names have base units, counters end in _total, and each of our metrics has a description."""
    for family in [*after_all.ours, *(f for f in after_all.families if f.name.startswith("temporal_"))]:
        assert re.fullmatch(r"[a-z][a-z0-9_]*", family.name)
        assert not re.search(r"_(ms|millis\w*|minutes|kb|mb|percent)$", family.name), family.name
        if family.name.startswith(OURS):
            assert family.documentation.endswith("."), family.name
        if family.type == "counter":
            assert all(sample.name.endswith("_total") for sample in family.samples), family.name
        elif family.type == "histogram":
            assert family.name.endswith("_seconds") or family.name == "gen_ai_client_token_usage", family.name
    served = Counter(family.name for family in after_all.ours)
    several = {name for name, processes in served.items() if processes > 1}
    assert several == {"llm_audit_lost"}, "more than one kind of process serves another metric"


async def test_every_process_serves_temporals_metrics_and_its_own(measured: Stack, after_all: Scrape) -> None:
    """Each process serves both on one port."""
    for name in SERVICES:
        families = {family.name for family in (await scrape(measured, name)).families}
        expected = {"temporal_request", "temporal_request_latency_seconds"} if name in TEMPORALS else set()
        assert expected | {"process_resident_memory_bytes"} <= families


async def test_the_page_lists_every_metric(after_all: Scrape) -> None:
    """docs/observe.md lists each of our metrics with its type and every label that is served."""
    rows = re.findall(r"^\| `(\w+)` \| (\w+) \|([^|]*)\|", PAGE.read_text(), re.MULTILINE)
    listed = {name: (kind, set(re.findall(r"`(\w+)`", labels))) for name, kind, labels in rows}
    served = {family.name + ("_total" if family.type == "counter" else ""): family for family in after_all.ours}
    kinds = {name: kind for name, (kind, _) in listed.items() if name not in UNUSED}
    assert kinds == {name: one.type for name, one in served.items()}
    for name, family in served.items():
        labels = {label for sample in family.samples for label in sample.labels} - {"le"} - TEMPORALS_LABELS
        assert labels <= listed[name][1], name


UNUSED = {
    "llm_engine_seat_release_duration_seconds",
    "llm_batch_flush_duration_seconds",
    "llm_batch_ended_total",
    "llm_pipeline_ended_total",
    "llm_pipeline_steps_total",
    "llm_job_cache_total",
    "llm_training_steps_total",
    "llm_training_tokens_total",
    "llm_training_loss_ratio",
    "llm_training_checkpoint_duration_seconds",
}
"""Metrics that are served once a job has paused or has asked the cache of answers, a batch or a pipeline has run, and
by a trainer: see test_seats, test_observability, tests/unit/test_answer_cache.py and tests/chaos/test_training.py."""
TEMPORALS_LABELS = {"namespace", "task_queue", "workflow_type"}
"""Labels that Temporal adds to the metrics of a workflow."""


@pytest.mark.parametrize("kind", SERVICES)
async def test_a_port_that_is_taken_ends_the_process(measured: Stack, kind: str) -> None:
    """The error names the address and the setting that changes it."""
    setting = f"{kind.replace('-', '_').upper()}_METRICS_PORT"
    address = measured.metrics_url("temporal").split("/")[2]
    process = measured.add(kind, {setting: address.rpartition(":")[2]})
    await process.start()
    assert await process.wait() == 1
    assert f"cannot serve metrics on {address}" in process.log
    assert setting in process.log
