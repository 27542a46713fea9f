"""Jobs that run while the workflow's code changes must continue: every recorded history replays.

The tests replay in Temporal's sandbox, which refuses nondeterministic code. The gateway runs the same code without the
sandbox, which is faster.
"""

import base64
import functools
import json
import re
import sys
import time
from collections.abc import AsyncIterator, Iterable
from pathlib import Path
from typing import Any

import pytest
from google.protobuf.json_format import MessageToDict
from google.protobuf.message import Message
from temporalio import workflow
from temporalio.client import WorkflowHistory
from temporalio.runtime import MetricBuffer, Runtime, TelemetryConfig
from temporalio.worker import Replayer, UnsandboxedWorkflowRunner, WorkflowRunner
from temporalio.worker.workflow_sandbox import SandboxedWorkflowRunner, SandboxRestrictions
from temporalio.workflow import NondeterminismError

from jobs import names
from jobs.rules import check_job
from llm_pb import internal_pb2, llm_pb2
from payload_converter import data_converter
from pipelines.registry import TYPED
from pipelines.workflow import LLMPipelineWorkflow
from tests.support.outcomes import OUTCOMES
from tests.support.paths import ROOT
from workflows.counted_files import CountedFiles
from workflows.ledger_slots import Slots
from workflows.llm_batch import LLMBatchWorkflow
from workflows.llm_deletion import LLMBulkDeletionWorkflow, LLMDeletionWorkflow, LLMJobTombstone
from workflows.llm_delivery import LLMDeliveryWorkflow
from workflows.llm_file import LLMFileWorkflow
from workflows.llm_job import LLMJobWorkflow
from workflows.llm_ledger import LLMLedgerWorkflow
from workflows.llm_models import LLMModelsWorkflow
from workflows.llm_scheduled import LLMScheduledWorkflow
from workflows.llm_user_deletion import LLMUserDeletionWorkflow

with workflow.unsafe.imports_passed_through():
    # The sandbox loads this module, too, and the whole stack is no concern of its.
    from services.gateway.pipelines.catalogue import load_pipelines
    from tests.support.pipelines import REGISTERED
    from tests.support.record_histories import HISTORIES, main

# The generated types register themselves once for each process, so the sandbox must share them.
SANDBOX = SandboxedWorkflowRunner(
    restrictions=SandboxRestrictions.default.with_passthrough_modules(
        "google", "jobs", "llm_pb", "payload_converter", "essay", "other_pipelines", "broken_pipelines"
    )
)
WORKFLOWS = (
    LLMJobWorkflow,
    LLMDeliveryWorkflow,
    LLMLedgerWorkflow,
    LLMDeletionWorkflow,
    LLMBulkDeletionWorkflow,
    LLMUserDeletionWorkflow,
    LLMJobTombstone,
    LLMFileWorkflow,
    LLMBatchWorkflow,
    LLMScheduledWorkflow,
    LLMPipelineWorkflow,
    LLMModelsWorkflow,
)
"""Workflows that the gateway runs."""
BY_TYPE = {str(workflow._Definition.must_from_class(one).name): one for one in WORKFLOWS}
"""A replayer loads each of its workflows into the sandbox again, which takes longer than the replay itself."""
RECORDED = sorted(HISTORIES.glob("*.json"))


@functools.cache
def read(path: Path) -> WorkflowHistory:
    text = path.read_text()
    started = json.loads(text)["events"][0]["workflowExecutionStartedEventAttributes"]
    return WorkflowHistory.from_json(started["workflowId"], text)


def replayer(*workflows: type, runner: WorkflowRunner = SANDBOX, runtime: Runtime | None = None) -> Replayer:
    return Replayer(workflows=workflows, data_converter=data_converter, workflow_runner=runner, runtime=runtime)


async def each(histories: Iterable[WorkflowHistory]) -> AsyncIterator[WorkflowHistory]:
    for history in histories:
        yield history


def test_every_outcome_is_recorded() -> None:
    assert {path.name.partition(".")[0] for path in RECORDED} >= set(OUTCOMES)


async def test_a_version_is_recorded_only_once() -> None:
    """Jobs like those of a recorded history may still be open somewhere, so no later recording replaces it."""
    versions = {path.stem.partition(".")[2] for path in RECORDED}
    docs = (ROOT / "CONTRIBUTING.md").read_text() + (ROOT / "Makefile").read_text()
    assert not versions & set(re.findall(r"make histories VERSION=(\w+)", docs)), "the docs name a version to record"
    for version in versions:
        with pytest.raises(FileExistsError, match=f"{version} .* next free version is v[0-9]+"):
            await main(version)


@pytest.fixture(scope="module", autouse=True)
def registered() -> None:
    """The pipelines of the recorded histories, as a gateway has them."""
    sys.path.append(str(REGISTERED))
    load_pipelines()


@functools.cache
def recorded() -> dict[str, dict[str, tuple[str, WorkflowHistory]]]:
    """Return the names and the histories of all files, by the type of the workflow and the id of the run."""
    found: dict[str, dict[str, tuple[str, WorkflowHistory]]] = {}
    for path in RECORDED:
        history = read(path)
        started = history.events[0].workflow_execution_started_event_attributes
        found.setdefault(started.workflow_type.name, {})[history.run_id] = (path.stem, history)
    return found


def test_every_recorded_history_is_of_a_workflow_of_the_gateway() -> None:
    assert {*recorded()} <= {*BY_TYPE}
    assert sum(map(len, recorded().values())) == len(RECORDED), "two histories have the same run id"


def test_every_pipeline_that_comes_along_is_recorded() -> None:
    """A change of its code that running ones do not survive is found by the replay."""
    recorded_specs = set()
    for _, history in recorded()[names.PIPELINE_WORKFLOW_TYPE].values():
        (payload,) = history.events[0].workflow_execution_started_event_attributes.input.payloads
        recorded_specs.add(
            data_converter.payload_converter.from_payload(payload, internal_pb2.PipelineRun).pipeline.WhichOneof("spec")
        )
    assert recorded_specs == {*TYPED, "custom"}


@pytest.mark.parametrize("workflow_type", BY_TYPE)
async def test_the_recorded_histories_replay(workflow_type: str) -> None:
    """One replayer for all, because it loads the workflow's modules into the sandbox before it replays anything."""
    of_type = recorded().get(workflow_type, {})

    histories = each(history for _, history in of_type.values())
    results = await replayer(BY_TYPE[workflow_type]).replay_workflows(histories, raise_on_replay_failure=False)
    assert not {of_type[run_id][0]: failure for run_id, failure in results.replay_failures.items()}


async def test_a_ledger_skips_no_deletion_in_a_replay_that_it_has_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """An earlier version counted that of a file which seems later than the one it knew. Behind the versions that it
    has given to gateways a ledger would count nothing more for them."""
    path = HISTORIES / "ledger.v8.json"
    history = json.loads(path.read_text())
    history["events"] = history["events"][:9]
    started, accepted = history["events"][0], history["events"][7]
    known = internal_pb2.CountedFile(file_id="a", version=1)
    known.create_time.FromNanoseconds(1)
    known.count_time.FromJsonString(started["eventTime"])
    state = internal_pb2.LedgerState(files=[known], files_version=1)
    gone = internal_pb2.CountFilesRequest(files=[{"file_id": "a", "create_time": {"nanos": 2}}], gone=True)
    update = accepted["workflowExecutionUpdateAcceptedEventAttributes"]["acceptedRequest"]["input"]
    update["name"] = names.UPDATE_COUNT_FILES
    start = started["workflowExecutionStartedEventAttributes"]["input"]
    start["payloads"], update["args"]["payloads"] = ([json_of(message)] for message in (state, gone))
    answers, count = list[internal_pb2.CountFilesResponse](), CountedFiles.count

    def recorded_count(self: CountedFiles, *arguments: Any) -> internal_pb2.CountFilesResponse:
        answers.append(count(self, *arguments))
        return answers[-1]

    monkeypatch.setattr(CountedFiles, "count", recorded_count)
    earlier = WorkflowHistory.from_json(read(path).workflow_id, json.dumps(history))
    await replayer(LLMLedgerWorkflow, runner=UnsandboxedWorkflowRunner()).replay_workflow(earlier)
    assert [answer.version for answer in answers] == [2]


async def test_a_ledger_tells_reservations_apart_only_in_a_run_that_did_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """An earlier version has freed the slot that another reservation holds. A replay that kept it would check it."""
    path = HISTORIES / "ledger.v8.json"
    history = json.loads(path.read_text())
    reserve = internal_pb2.ReserveRequest(workflow_ids=["a"], limit=2, reservations=[1])
    release = internal_pb2.ReleaseRequest(workflow_ids=["a", "c"], reservations=[2, 0])
    update = history["events"][7]["workflowExecutionUpdateAcceptedEventAttributes"]["acceptedRequest"]["input"]
    update["args"]["payloads"] = [json_of(reserve)]
    signal = history["events"][22]["workflowExecutionSignaledEventAttributes"]["input"]
    signal["payloads"] = [json_of(release)]
    freed, free = list[tuple[str, int]](), Slots.free

    def recorded_free(self: Slots, id_: str, reservation: int, used_tokens: int | None) -> int:
        freed.append((id_, reservation))
        return free(self, id_, reservation, used_tokens)

    monkeypatch.setattr(Slots, "free", recorded_free)
    earlier = WorkflowHistory.from_json(read(path).workflow_id, json.dumps(history))
    await replayer(LLMLedgerWorkflow, runner=UnsandboxedWorkflowRunner()).replay_workflow(earlier)
    assert freed == [("a", 0), ("c", 0)]


def json_of(message: Message) -> Any:
    """Return a message as the payload of a history in JSON."""
    (payload,) = data_converter.payload_converter.to_payloads([message])
    return MessageToDict(payload)


async def test_a_question_of_which_an_earlier_version_took_no_notice_changes_nothing_in_a_replay() -> None:
    """During an upgrade a pipeline of this version may be a step of one that a gateway of an earlier version runs."""
    path = HISTORIES / "pipeline-with-a-batch.v8.json"
    history = json.loads(path.read_text())
    # It comes with a timer after which there was nothing to do, as event 40.
    before, after = history["events"][:39], [_later_by_one(event, 40) for event in history["events"][39:]]
    questions = internal_pb2.PipelineQuestions(pipeline_id=f"{read(path).workflow_id}/lines", needs_answer=1)
    signaled = {
        "eventId": "40",
        "eventTime": before[-1]["eventTime"],
        "eventType": "EVENT_TYPE_WORKFLOW_EXECUTION_SIGNALED",
        "workflowExecutionSignaledEventAttributes": {
            "signalName": names.SIGNAL_QUESTIONS,
            "input": {"payloads": [json_of(questions)]},
        },
    }
    history["events"] = [*before, signaled, *after]
    earlier = WorkflowHistory.from_json(read(path).workflow_id, json.dumps(history))
    await replayer(LLMPipelineWorkflow, runner=UnsandboxedWorkflowRunner()).replay_workflow(earlier)


def _later_by_one(value: Any, first: int) -> Any:
    """Return a part of a history with the ids of events from one on increased by one."""
    if isinstance(value, list):
        return [_later_by_one(item, first) for item in value]
    if not isinstance(value, dict):
        return value
    return {
        name: str(int(item) + 1)
        if name.lower().endswith("eventid") and int(item) >= first
        else _later_by_one(item, first)
        for name, item in value.items()
    }


async def test_a_job_whose_deliveries_had_a_long_id_replays() -> None:
    """An earlier version did not shorten the id of an LLMDeliveryWorkflow, and a job's id could be as long."""
    short = read(HISTORIES / "succeeded-notification-failed.v1.json")
    text = json.dumps(short.to_json_dict()).replace(short.workflow_id, short.workflow_id.ljust(300, "x"))
    assert f"{names.DELIVERY_WORKFLOW_TYPE}" in text
    long = WorkflowHistory.from_json(short.workflow_id.ljust(300, "x"), text)
    await replayer(LLMJobWorkflow).replay_workflow(long)


@pytest.mark.parametrize(
    "changes",
    [
        {"params": {"regex": "((a*)*)*"}},
        {"notify": [{"webhook": {"url": "https://10.1/hook"}}]},
        {"model": "m" * 256},
    ],
    ids=["a regex", "a host", "a model"],
)
async def test_a_job_by_hand_goes_on_whose_form_is_refused_since(changes: dict[str, Any]) -> None:
    path = HISTORIES / "started-by-hand.v1.json"
    history = json.loads(path.read_text())
    (payload,) = history["events"][0]["workflowExecutionStartedEventAttributes"]["input"]["payloads"]
    job = llm_pb2.JobRequest.FromString(base64.b64decode(payload["data"]))
    for field in changes:
        job.ClearField(field)
    job.MergeFrom(llm_pb2.JobRequest(**changes))
    assert check_job(job), "the current rules must refuse the job"
    payload["data"] = base64.b64encode(job.SerializeToString()).decode()
    recorded = WorkflowHistory.from_json(read(path).workflow_id, json.dumps(history))
    await replayer(LLMJobWorkflow).replay_workflow(recorded)


@workflow.defn(name=names.JOB_WORKFLOW_TYPE)
class Counts(LLMJobWorkflow):
    """Workflow that increments a counter in a replay, too."""

    @workflow.run
    async def run(self, job: llm_pb2.JobRequest | None = None) -> llm_pb2.JobResult:
        workflow.metric_meter()._underlying.create_counter("llm.unsafe").add(1)  # type: ignore[attr-defined]
        return await super().run(job)


@pytest.mark.parametrize(
    ("workflow_class", "paths", "counted"),
    [(LLMJobWorkflow, RECORDED, set()), (Counts, [HISTORIES / "succeeded.v1.json"], {"llm.unsafe"})],
)
async def test_a_replay_counts_no_job_again(workflow_class: type, paths: list[Path], counted: set[str]) -> None:
    """This holds for every outcome, with the gateway's workflow runner. `Counts` proves that a fault would be found."""
    buffer = MetricBuffer(10_000)
    runtime = Runtime(telemetry=TelemetryConfig(metrics=buffer))
    replaying = replayer(workflow_class, *WORKFLOWS[1:], runner=UnsandboxedWorkflowRunner(), runtime=runtime)
    await replaying.replay_workflows(each(read(path) for path in paths))
    assert {update.metric.name for update in buffer.retrieve_updates()} == counted


@workflow.defn(name=names.JOB_WORKFLOW_TYPE)
class NotifiesFirst(LLMJobWorkflow):
    """Workflow with a change that would break running jobs."""

    @workflow.run
    async def run(self, job: llm_pb2.JobRequest | None = None) -> llm_pb2.JobResult:
        await self._notify(llm_pb2.JOB_STATE_SUCCEEDED)
        return await super().run(job)


@workflow.defn(name=names.JOB_WORKFLOW_TYPE)
class AsksTheClock(LLMJobWorkflow):
    """Workflow with code that is not deterministic."""

    @workflow.run
    async def run(self, job: llm_pb2.JobRequest | None = None) -> llm_pb2.JobResult:
        time.time()
        return await super().run(job)


async def test_code_that_is_not_deterministic_is_found() -> None:
    with pytest.raises(RuntimeError, match="Cannot access time"):
        await replayer(AsksTheClock).replay_workflow(read(HISTORIES / "succeeded.v1.json"))


async def test_a_change_that_breaks_running_jobs_is_found() -> None:
    with pytest.raises(NondeterminismError):
        await replayer(NotifiesFirst).replay_workflow(read(HISTORIES / "succeeded.v1.json"))


async def test_a_batch_begins_no_part_once_temporal_suggests_a_new_run() -> None:
    """It would do so at the end of a run: a batch of a million lines has more parts than one history holds."""
    path = HISTORIES / "batch-succeeded.v5.json"
    suggested = read.__wrapped__(path)
    for event in suggested.events:
        if event.HasField("workflow_task_started_event_attributes"):
            event.workflow_task_started_event_attributes.suggest_continue_as_new = True
    replaying = replayer(LLMBatchWorkflow, runner=UnsandboxedWorkflowRunner())
    await replaying.replay_workflow(read(path))
    with pytest.raises(NondeterminismError):
        await replaying.replay_workflow(suggested)
