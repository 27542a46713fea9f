"""Classes of jobs: queues, turns, rates, defaults, scopes and lists of their own, on the real Temporal server."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf.duration_pb2 import Duration
from temporalio import activity
from temporalio.api.enums.v1 import TaskQueueType
from temporalio.api.taskqueue.v1 import RateLimit, TaskQueue
from temporalio.api.workflow.v1 import PendingActivityInfo
from temporalio.api.workflowservice.v1 import DescribeTaskQueueRequest, UpdateTaskQueueConfigRequest
from temporalio.client import Client, WorkflowExecutionDescription
from temporalio.worker import Worker

from deploy.local.stack import Stack
from jobs import names
from jobs.application_errors import to_attempt_error
from jobs.errors import WorkerShutdown
from llm_pb import common_pb2, internal_pb2, llm_pb2
from llm_pb.llm_pb2_grpc import LlmServiceStub
from runtime import scopes
from tests.support.credentials import CallsAs, KeyFile
from tests.support.jobs import details_of, new_job, watch
from tests.support.scrapes import scrape_until
from tests.support.turns import new_turns

HIGH, STANDARD = common_pb2.JOB_CLASS_HIGH, common_pb2.JOB_CLASS_STANDARD
BACKGROUND, SCHEDULED = common_pb2.JOB_CLASS_BACKGROUND, common_pb2.JOB_CLASS_SCHEDULED
ALL = (HIGH, STANDARD, BACKGROUND, SCHEDULED)
IDLE_QUEUE = "llm-gpu-activities.idle"
PATIENCE = 60
FLOOD = 30

pytestmark = pytest.mark.timeout(400)


async def submit(stub: Any, job: llm_pb2.JobRequest) -> str:
    id_: str = (await stub.Submit(llm_pb2.SubmitRequest(job=job))).workflow_id
    return id_


async def refusal(call: Any) -> grpc.aio.AioRpcError:
    with pytest.raises(grpc.aio.AioRpcError) as error:
        await call
    return error.value


@asynccontextmanager
async def another_gateway(stack: Stack, **settings: Any) -> AsyncIterator[LlmServiceStub]:
    """Run a gateway with some settings; those that are no text are JSON."""
    texts = {name: value if isinstance(value, str) else json.dumps(value) for name, value in settings.items()}
    gateway = stack.add("gateway", texts)
    await gateway.start()
    await gateway.wait_ready()
    async with grpc.aio.insecure_channel(stack.address(gateway.name)) as channel:
        yield LlmServiceStub(channel)
    await gateway.terminate()


async def at_the_gpu(temporal: Client, id_: str) -> tuple[WorkflowExecutionDescription, PendingActivityInfo]:
    """Return a job that waits for a worker, with the activity for which it waits."""
    async with asyncio.timeout(PATIENCE):
        while True:
            described = await temporal.get_workflow_handle(id_).describe()
            if pending := described.raw_description.pending_activities:
                return described, pending[0]
            await asyncio.sleep(0.05)


# Turns


@pytest.mark.parametrize(
    ("more", "fewer", "queue"),
    [(HIGH, STANDARD, ""), pytest.param(BACKGROUND, SCHEDULED, ".background", marks=pytest.mark.long)],
)
async def test_a_flood_of_a_class_does_not_starve_the_other_of_its_queue(
    stack: Stack, more: Any, fewer: Any, queue: str
) -> None:
    """Two turns to one by default: weights of 100 and 50, and of 10 and 5."""
    no_rate = {"GATEWAY_CLASSES": '{"HIGH": {"rate": null}, "BACKGROUND": {"rate": null}}'}
    name = f"turns-of-classes-{more}"
    async with new_turns(stack, name, worker_queue=f"{name}{queue}", **no_rate) as turns:
        flood = [await turns.submit("many", job_class=more) for _ in range(FLOOD)]
        others = [await turns.submit("few", job_class=fewer) for _ in range(FLOOD)]
        order = await turns.started([*flood, *others])
    first = order[:FLOOD]
    # A worker may hold a task or two before it begins them.
    assert abs(sum(id_ in others for id_ in first) - FLOOD / 3) <= 3


async def test_each_class_has_turns_of_its_own(temporal: Client, stub: LlmServiceStub) -> None:
    """A job that names no class, or STANDARD, has the key that it had before there were classes."""
    for job_class, key, weight in (
        (0, "{}", 0),
        (STANDARD, "{}", 0),
        (HIGH, "/HIGH/{}", 2),
        (BACKGROUND, "/BACKGROUND/{}", 0.2),
        (SCHEDULED, "/SCHEDULED/{}", 0.1),
    ):
        job = new_job(model="idle", job_class=job_class)
        described, pending = await at_the_gpu(temporal, await submit(stub, job))
        for priority in (described.raw_description.workflow_execution_info.priority, pending.priority):
            assert priority.fairness_key == key.format(job.user_id)
            assert priority.fairness_weight == pytest.approx(weight)


# Queues and time limits


async def test_background_jobs_wait_in_a_queue_of_their_own_for_hours(temporal: Client, stub: LlmServiceStub) -> None:
    for job_class in ALL:
        background = job_class in (BACKGROUND, SCHEDULED)
        id_ = await submit(stub, new_job(model="idle", job_class=job_class))
        described, pending = await at_the_gpu(temporal, id_)
        options = pending.activity_options
        assert options.task_queue.name == (f"{IDLE_QUEUE}.background" if background else IDLE_QUEUE)
        wait = timedelta(hours=12) if background else timedelta(minutes=5)
        assert options.schedule_to_start_timeout.ToTimedelta() == wait
        total = described.raw_description.execution_config.workflow_execution_timeout.ToTimedelta()
        assert total == timedelta(hours=24 if background else 8)


async def test_a_jobs_own_limits_hold_in_every_class(stub: LlmServiceStub) -> None:
    job = new_job(model="idle", job_class=BACKGROUND, timeouts={"queue": Duration(seconds=1)})
    seen = await watch(stub, await submit(stub, job))
    assert seen.states[-1] == "TIMED_OUT"
    assert seen.final.status.job_class == BACKGROUND
    late = new_job(model="idle", job_class=BACKGROUND, timeouts={"queue": Duration(seconds=13 * 3600)})
    error = await refusal(submit(stub, late))
    assert [one.field for one in details_of(error)["BadRequest"].field_violations] == ["job.timeouts.queue"]


class Crowded:
    """A worker that has a seat for a job at its last try alone."""

    def __init__(self, pauses: int) -> None:
        self._pauses = pauses

    @activity.defn(name=names.ACTIVITY_RUN)
    async def run(self, request: internal_pb2.RunRequest) -> llm_pb2.JobResult:
        """Hand the job over as a worker without a seat does, or finish it."""
        number = request.earlier_attempts + activity.info().attempt
        metadata = llm_pb2.ResultMetadata(attempts=number, pauses=request.unseated, engine_time=Duration(seconds=1))
        result = llm_pb2.JobResult(metadata=metadata, finish_reason=llm_pb2.FINISH_REASON_STOP)
        attempt = result.attempts.add(attempt=number, end=llm_pb2.ATTEMPT_END_FINISHED)
        attempt.start_time.GetCurrentTime()
        if request.unseated < self._pauses:
            attempt.end = llm_pb2.ATTEMPT_END_PAUSED
            raise to_attempt_error(WorkerShutdown("the seats of the worker are taken"), result)
        return result


async def test_a_job_may_pause_more_often_than_it_may_be_handed_over(temporal: Client, stub: LlmServiceStub) -> None:
    """A hundred workers may have to stop while they run a job. Pauses are none of them, and use up no attempt."""
    pauses = 101
    async with Worker(temporal, task_queue=f"{IDLE_QUEUE}.background", activities=[Crowded(pauses).run]):
        id_ = await submit(stub, new_job(model="idle", job_class=BACKGROUND))
        seen = await watch(stub, id_)
    assert (seen.states[-1], seen.final.status.attempt) == ("SUCCEEDED", 1)
    assert seen.final.result.metadata.pauses == pauses


async def test_the_operators_limits_hold_in_every_class(stack: Stack, temporal: Client) -> None:
    """A class's default is at most the maximum. What is left out of the settings of a class keeps its default."""
    settings = {
        "GATEWAY_CLASSES": {"BACKGROUND": {"weight": 20}, "SCHEDULED": {"queue_timeout": "PT90S"}},
        "GATEWAY_MAX_QUEUE_TIMEOUT": "PT1H",
    }
    async with another_gateway(stack, **settings) as stub:
        for job_class, wait in ((BACKGROUND, 3600), (SCHEDULED, 90)):
            _, pending = await at_the_gpu(temporal, await submit(stub, new_job(model="idle", job_class=job_class)))
            assert pending.activity_options.schedule_to_start_timeout.ToTimedelta() == timedelta(seconds=wait)


async def test_models_and_waiting_jobs_show_the_queue_of_the_class(stack: Stack) -> None:
    """Temporal counts a queue, not a class. The backlog of a model counts all its jobs."""
    model = {"name": "shown", "context_tokens": 64, "max_output_tokens": 64, "default_max_tokens": 64, "queue": "shown"}
    classes = {"HIGH": {"weight": 200}}
    async with another_gateway(stack, GATEWAY_MODELS=[model], GATEWAY_CLASSES=classes) as stub:
        ids = [await submit(stub, new_job(model="shown", job_class=one)) for one in (BACKGROUND, SCHEDULED, STANDARD)]
        async with asyncio.timeout(PATIENCE):
            while True:
                (info,) = (await stub.ListModels(llm_pb2.ListModelsRequest())).models
                if info.backlog == len(ids):
                    break
                await asyncio.sleep(0.2)
        assert [(one.job_class, one.backlog, one.weight) for one in info.classes] == [
            (HIGH, 1, 200),
            (STANDARD, 1, 50),
            (BACKGROUND, 2, 10),
            (SCHEDULED, 2, 5),
        ]
        for id_, backlog in zip(ids, (2, 2, 1), strict=True):
            status = (await stub.GetStatus(llm_pb2.GetStatusRequest(workflow_id=id_))).status
            assert status.queue.backlog == backlog


# Rates


async def test_a_rate_refuses_new_jobs_of_its_class_alone(stack: Stack) -> None:
    """With the wait. A repeat of an accepted job finds it."""
    rate = 0.01
    async with another_gateway(stack, GATEWAY_CLASSES={"BACKGROUND": {"rate": rate}}) as stub:
        job = new_job(model="idle", job_class=BACKGROUND)
        accepted = await submit(stub, job)
        error = await refusal(submit(stub, new_job(model="idle", job_class=BACKGROUND)))
        assert error.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
        assert "JOB_CLASS_BACKGROUND" in (error.details() or "")
        details = details_of(error)
        assert details["ErrorInfo"].reason == "LIMIT_REACHED"
        assert details["ErrorInfo"].metadata["job_class"] == "JOB_CLASS_BACKGROUND"
        assert timedelta(0) < details["RetryInfo"].retry_delay.ToTimedelta() <= timedelta(seconds=1 / rate)
        assert await submit(stub, job) == accepted
        other = new_job(user_id=job.user_id, request_id=job.request_id, model="idle", job_class=BACKGROUND, priority=4)
        assert (await refusal(submit(stub, other))).code() == grpc.StatusCode.ALREADY_EXISTS
        for job_class in (STANDARD, SCHEDULED):
            for _ in range(3):
                await submit(stub, new_job(model="idle", job_class=job_class))


async def test_a_repeated_submit_uses_up_no_rate(stack: Stack) -> None:
    """Two jobs at once are within the rate, however often the first one is submitted meanwhile."""
    async with another_gateway(stack, GATEWAY_CLASSES={"BACKGROUND": {"rate": 1.01}}) as stub:
        job = new_job(model="idle", job_class=BACKGROUND)
        accepted = await submit(stub, job)
        for _ in range(5):
            assert await submit(stub, job) == accepted
        await submit(stub, new_job(model="idle", job_class=BACKGROUND))


async def test_the_usual_class_has_no_rate(stack: Stack) -> None:
    """Who has submitted faster than the classes' numbers before goes on as before."""
    async with another_gateway(stack) as stub:
        jobs = [new_job(model="idle", user_id="hasty") for _ in range(120)]
        await asyncio.gather(*(submit(stub, job) for job in jobs))


async def test_a_queues_rate_in_temporal_is_the_sum_of_its_classes(stack: Stack, temporal: Client) -> None:
    """A gateway without them removes it, and leaves one that somebody else has set."""
    rates = {"HIGH": {"rate": 8}, "STANDARD": {"rate": 4}, "BACKGROUND": {"rate": 2}, "SCHEDULED": {"rate": 0.5}}
    model = {"name": "rated", "context_tokens": 64, "max_output_tokens": 64, "default_max_tokens": 64, "queue": "rated"}
    by_hand = UpdateTaskQueueConfigRequest(
        namespace="default", task_queue="rated", task_queue_type=TaskQueueType.TASK_QUEUE_TYPE_ACTIVITY
    )
    by_hand.update_queue_rate_limit.rate_limit.CopyFrom(RateLimit(requests_per_second=3))
    by_hand.update_queue_rate_limit.reason = "an operator's"
    async with another_gateway(stack, GATEWAY_MODELS=[model], GATEWAY_CLASSES=rates):
        await until_rate(temporal, "rated", 12)
        await until_rate(temporal, "rated.background", 2.5)
    async with another_gateway(stack, GATEWAY_MODELS=[model], GATEWAY_CLASSES={**rates, "STANDARD": {}}):
        await until_rate(temporal, "rated", None)
        await temporal.workflow_service.update_task_queue_config(by_hand)
    async with another_gateway(stack, GATEWAY_MODELS=[model]):
        await until_rate(temporal, "rated.background", None)
        await until_rate(temporal, "rated", 3)


async def until_rate(temporal: Client, queue: str, rate: float | None) -> None:
    request = DescribeTaskQueueRequest(
        namespace="default",
        task_queue=TaskQueue(name=queue),
        task_queue_type=TaskQueueType.TASK_QUEUE_TYPE_ACTIVITY,
        report_config=True,
    )
    async with asyncio.timeout(PATIENCE):
        while True:
            limit = (await temporal.workflow_service.describe_task_queue(request)).config.queue_rate_limit
            if (limit.rate_limit.requests_per_second if limit.HasField("rate_limit") else None) == rate:
                return
            await asyncio.sleep(0.1)


# Scopes, rules, lists


async def test_only_high_needs_a_scope(stack: Stack, tmp_path: Path) -> None:
    keys = KeyFile(tmp_path / "keys.json")
    some, more = keys.add([scopes.SUBMIT]), keys.add([scopes.SUBMIT, scopes.PRIORITY])
    async with another_gateway(stack, GATEWAY_API_KEYS_FILE=str(keys.path)) as stub:
        for job_class in (STANDARD, BACKGROUND, SCHEDULED):
            await submit(CallsAs(stub, some), new_job(model="idle", job_class=job_class))
        job = new_job(model="idle", job_class=HIGH)
        error = await refusal(submit(CallsAs(stub, some), job))
        assert error.code() == grpc.StatusCode.PERMISSION_DENIED
        assert details_of(error)["ErrorInfo"].metadata["scope"] == scopes.PRIORITY
        await submit(CallsAs(stub, more), job)


async def test_a_class_that_is_not_known_is_refused_by_name(stub: LlmServiceStub) -> None:
    error = await refusal(submit(stub, new_job(job_class=9)))
    assert error.code() == grpc.StatusCode.INVALID_ARGUMENT
    (violation,) = details_of(error)["BadRequest"].field_violations
    assert violation.field == "job.job_class"
    assert "JOB_CLASS_BACKGROUND" in violation.description
    for wrong in (0, 9):
        error = await refusal(stub.List(llm_pb2.ListRequest(classes=[HIGH, wrong])))  # type: ignore[list-item]
        (violation,) = details_of(error)["BadRequest"].field_violations
        assert violation.field == "classes[1]"


async def test_a_job_that_names_the_usual_class_is_the_same_job(stub: LlmServiceStub) -> None:
    job = new_job(model="idle")
    first = await submit(stub, job)
    job.job_class = STANDARD
    assert await submit(stub, job) == first
    job.job_class = BACKGROUND
    assert (await refusal(submit(stub, job))).code() == grpc.StatusCode.ALREADY_EXISTS


async def test_jobs_are_listed_by_class(stub: LlmServiceStub, temporal: Client) -> None:
    """Open ones and closed ones. Only jobs of another class than STANDARD have the search attribute."""
    user = new_job().user_id
    ids: dict[int, set[str]] = {}
    for job_class in (0, *ALL):
        job = new_job(user_id=user, model="idle", job_class=job_class)
        ids.setdefault(job_class or STANDARD, set()).add(await submit(stub, job))
        response = await stub.Submit(llm_pb2.SubmitRequest(job=job))
        assert response.status.job_class == (job_class or STANDARD)
    done = new_job(user_id=user, job_class=HIGH, params={"max_tokens": 3})
    ids[HIGH].add(done_id := await submit(stub, done))
    final = (await watch(stub, done_id)).final.status
    assert (final.state, final.job_class) == (llm_pb2.JOB_STATE_SUCCEEDED, HIGH)
    for chosen in ([], [HIGH], [STANDARD], [BACKGROUND, SCHEDULED], [STANDARD, HIGH], ALL):
        expected = {(id_, one) for one in chosen or ALL for id_ in ids[one]}
        found = await until_listed(stub, len(expected), user_id=user, classes=chosen)
        assert {(item.status.workflow_id, item.job_class) for item in found} == expected
        assert all(item.status.job_class == item.job_class for item in found)
    page = await stub.List(llm_pb2.ListRequest(user_id=user, classes=[STANDARD, HIGH], page_size=1))
    same = llm_pb2.ListRequest(user_id=user, classes=[HIGH, STANDARD], page_size=1, page_token=page.next_page_token)
    assert (await stub.List(same)).jobs
    other = llm_pb2.ListRequest(user_id=user, classes=[HIGH], page_size=1, page_token=page.next_page_token)
    assert (await refusal(stub.List(other))).code() == grpc.StatusCode.INVALID_ARGUMENT
    for job_class, name in ((STANDARD, None), (HIGH, "JOB_CLASS_HIGH")):
        described = await temporal.get_workflow_handle(min(ids[job_class])).describe()
        assert described.typed_search_attributes.get(names.JOB_CLASS) == name


async def until_listed(stub: LlmServiceStub, count: int, **filters: Any) -> list[llm_pb2.JobSummary]:
    """Return the jobs once there are `count`; visibility learns of a job a moment later."""
    async with asyncio.timeout(PATIENCE):
        while True:
            jobs = [*(await stub.List(llm_pb2.ListRequest(page_size=100, **filters))).jobs]
            if len(jobs) >= count:
                return jobs
            await asyncio.sleep(0.1)


# Metrics


async def test_metrics_tell_classes_and_queues_apart(stack: Stack) -> None:
    model = {"name": "metered", "context_tokens": 64, "max_output_tokens": 64, "default_max_tokens": 64, "queue": "m"}
    settings = {"GATEWAY_MODELS": json.dumps([model]), "GATEWAY_OPEN_JOBS_INTERVAL": "PT1S"}
    rates = {"GATEWAY_CLASSES": json.dumps({"HIGH": {"rate": 0.01}})}
    gateway = stack.add("gateway", {**settings, **rates})
    await gateway.start()
    await gateway.wait_ready()
    async with grpc.aio.insecure_channel(stack.address(gateway.name)) as channel:
        stub = LlmServiceStub(channel)
        for job_class in (HIGH, STANDARD, BACKGROUND, BACKGROUND, SCHEDULED):
            await submit(stub, new_job(model="metered", job_class=job_class))
        await refusal(submit(stub, new_job(model="metered", job_class=HIGH)))
    waiting = {("interactive", "queued"): 2, ("interactive", "running"): 0} | {
        ("background", "queued"): 3,
        ("background", "running"): 0,
    }
    found = await scrape_until(
        stack, lambda found: found.by("llm_job_open", "llm_job_queue", "llm_job_state") == waiting, gateway.name
    )
    submitted = found.by("llm_job_submitted_total", "llm_job_class")
    assert submitted == {("high",): 1, ("standard",): 1, ("background",): 2, ("scheduled",): 1}
    refused = found.by("llm_gateway_class_refusals_total", "llm_job_class")
    assert refused == {("high",): 1, ("standard",): 0, ("background",): 0, ("scheduled",): 0}
    await gateway.terminate()
