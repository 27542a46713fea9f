"""Batches by BatchService: planned, run in chunks, merged; followed, read while they run, stopped, listed."""

import asyncio
from collections.abc import AsyncIterator
from datetime import timedelta
from typing import Any

import grpc
import pytest
from google.rpc import error_details_pb2
from temporalio.client import Client, WorkflowHistory
from temporalio.worker import Replayer

from deploy.local.stack import Stack
from jobs import names
from jobs.ids import batch_workflow_id
from llm_pb import batch_pb2, internal_pb2, llm_pb2
from llm_pb.batch_pb2_grpc import BatchServiceStub
from llm_pb.file_pb2_grpc import FileServiceStub
from llm_pb.llm_pb2_grpc import LlmServiceStub
from payload_converter import data_converter
from services.gateway.quotas.ended_jobs import LedgerActivities
from tests.contract.test_replay import SANDBOX
from tests.support.batches import Stubs, by_index, create, custom_id_of, lines_of, new_batch, running, to_jsonl
from tests.support.files import PATIENCE, delete, until
from tests.support.jobs import details_of, new_job, run_job, unpack
from workflows.llm_batch import LLMBatchWorkflow


@pytest.fixture(scope="session")
async def stubs(stack: Stack) -> AsyncIterator[Stubs]:
    async with grpc.aio.insecure_channel(stack.address("gateway")) as channel:
        yield Stubs(FileServiceStub(channel), BatchServiceStub(channel))


async def refusal(call: Any) -> tuple[str, str]:
    """Return the code and the reason with which a call fails."""
    with pytest.raises(grpc.aio.AioRpcError) as error:
        await call
    return error.value.code().name, details_of(error.value)["ErrorInfo"].reason


def reason_of(status: batch_pb2.BatchStatus) -> str:
    return str(unpack(status.error)["ErrorInfo"].reason)


async def test_a_batch_ends_with_every_line_once_in_the_order_of_its_input(
    stubs: Stubs, temporal: Client, stack: Stack
) -> None:
    lines = lines_of(300)
    async with running(temporal, stack.state_dir, failing=frozenset({7, 8, 299})) as engine:
        created = await create(stubs, lines)
        assert created.state == batch_pb2.BATCH_STATE_VALIDATING
        status = await stubs.end(created.batch_id)
    assert status.state == batch_pb2.BATCH_STATE_SUCCEEDED
    counts = status.counts
    assert (counts.total, counts.succeeded, counts.failed) == (300, 297, 3)
    assert len(engine.attempts) > 5
    assert status.usage.output_tokens == sum(len(f"Say {number}.") for number in range(300))
    output, errors = await stubs.read(status.output), await stubs.read(status.errors)
    expected = [custom_id_of({"custom_id": line.get("custom_id", line.get("request_id"))}) for line in lines]
    failed = [expected[index] for index in (7, 8, 299)]
    assert [custom_id_of(line) for line in output] == [id_ for id_ in expected if id_ not in failed]
    assert [custom_id_of(line) for line in errors] == failed
    assert output[1]["response"]["body"]["choices"][0]["message"]["content"] == ".1 yaS"
    assert output[0]["result"]["output"] == ".0 yaS"
    items = by_index(await stubs.results(created.batch_id))
    assert sorted(items) == list(range(300))
    assert items[7].state == llm_pb2.JOB_STATE_FAILED
    # What a ledger counts of it that did not learn of its end.
    request = internal_pb2.FindEndedJobsRequest(workflow_ids=[created.batch_id])
    found = await LedgerActivities(temporal).find_ended_jobs(request)
    assert [*found.output_tokens] == [status.usage.output_tokens]


async def test_results_are_read_while_a_batch_runs_and_each_once(stubs: Stubs, temporal: Client, stack: Stack) -> None:
    async with running(temporal, stack.state_dir, hold_after=10) as engine:
        # Whatever its class, it is in the queue of the background.
        created = await create(stubs, lines_of(200), job_class="JOB_CLASS_STANDARD")
        found: list[batch_pb2.BatchItem] = []
        cursor = ""
        # Each stream breaks after a message, and the next one goes on.
        while len(found) < 100:
            request = batch_pb2.StreamBatchResultsRequest(batch_id=created.batch_id, cursor=cursor)
            call = stubs.batches.StreamBatchResults(request, timeout=PATIENCE)
            message = await call.read()
            call.cancel()
            found += message.items
            cursor = message.cursor
            assert len(cursor) <= 4096
        status = await stubs.get(created.batch_id)
        assert status.state == batch_pb2.BATCH_STATE_RUNNING
        assert status.counts.succeeded >= 100
        assert status.counts.total == 200
        assert status.tokens_per_second > 0
        assert status.HasField("estimated_end_time")
        engine.go_on.set()
        found += await stubs.results(created.batch_id, cursor)
        assert sorted(by_index(found)) == list(range(200))
        assert (await stubs.end(created.batch_id)).counts.succeeded == 200
    assert await stubs.results(created.batch_id, cursor) != []
    other = await refusal(stubs.results(created.batch_id + "x", cursor))
    assert other == ("INVALID_ARGUMENT", "INVALID_REQUEST")


async def test_the_next_attempt_of_a_chunk_gets_what_the_last_one_has_done(
    stubs: Stubs, temporal: Client, stack: Stack
) -> None:
    async with running(temporal, stack.state_dir, die_after=10, compact=False) as engine:
        created = await create(stubs, lines_of(100))
        status = await stubs.end(created.batch_id)
    assert status.state == batch_pb2.BATCH_STATE_SUCCEEDED
    assert {done for _, done in engine.attempts} == {0, 10}
    assert len(await stubs.read(status.output)) == 100


async def test_a_cancelled_batch_keeps_what_has_ended(stubs: Stubs, temporal: Client, stack: Stack) -> None:
    async with running(temporal, stack.state_dir, hold_after=10):
        created = await create(stubs, lines_of(100))
        await until(lambda: has_done(stubs, created.batch_id, 60))
        cancelled = await stubs.cancel(created.batch_id, "not needed")
        assert cancelled.cancel_requested
        status = await stubs.end(created.batch_id)
    assert status.state == batch_pb2.BATCH_STATE_CANCELLED
    assert reason_of(status) == "CANCELLED"
    assert status.error.message == "not needed"
    assert status.counts.succeeded >= 60
    assert status.counts.succeeded + status.counts.cancelled == 100
    assert len(await stubs.read(status.output)) == status.counts.succeeded
    errors = await stubs.read(status.errors)
    assert len(errors) == status.counts.cancelled
    assert "batch_cancelled" in {line["error"]["code"] for line in errors if "method" not in line and "id" in line}
    items = by_index(await stubs.results(created.batch_id))
    assert len(items) == 100
    assert (await stubs.cancel(created.batch_id)) == status
    await replay(await temporal.get_workflow_handle(created.batch_id).fetch_history())


async def has_state(stubs: Stubs, batch_id: str, state: "batch_pb2.BatchState.ValueType") -> bool:
    return (await stubs.get(batch_id)).state == state


async def has_done(stubs: Stubs, batch_id: str, least: int) -> bool:
    return (await stubs.get(batch_id)).counts.succeeded >= least


async def test_a_cancel_keeps_what_a_chunk_did_whose_worker_is_gone(
    stubs: Stubs, temporal: Client, stack: Stack
) -> None:
    """Temporal drops the heartbeat of an activity that waits for its next attempt."""
    async with running(temporal, stack.state_dir, die_after=10):
        created = await create(stubs, lines_of(16))
        await until(lambda: has_done(stubs, created.batch_id, 10))
    # The worker has stopped. Its attempt may have been the second one, which then has ended the batch.
    await stubs.cancel(created.batch_id)
    status = await stubs.end(created.batch_id)
    assert status.counts.succeeded >= 10
    assert status.counts.succeeded + status.counts.cancelled == 16
    # The chunk's log is removed at the end, because its worker cannot do it any more.
    history = await temporal.get_workflow_handle(created.batch_id).fetch_history()
    scheduled = [event.activity_task_scheduled_event_attributes for event in history.events]
    (inputs,) = [one.input.payloads for one in scheduled if one.activity_type.name == "CleanBatch"]
    (request,) = await data_converter.decode(inputs, [internal_pb2.CleanRequest])
    assert [*request.chunks] == ([0] if status.counts.cancelled else [])


async def test_a_batch_expires_with_what_has_ended(stubs: Stubs, temporal: Client, stack: Stack) -> None:
    async with running(temporal, stack.state_dir, hold_after=5):
        for seconds in (5, 30, 120):
            created = await create(stubs, lines_of(20), window=timedelta(seconds=seconds))
            status = await stubs.end(created.batch_id)
            # On a busy machine the window may be over before the first item has ended.
            if status.counts.succeeded:
                break
    assert status.state == batch_pb2.BATCH_STATE_EXPIRED
    assert status.counts.succeeded + status.counts.expired == 20
    assert status.counts.expired > 0
    assert reason_of(status) == "WINDOW_OVER"


async def test_a_batch_expires_although_the_clocks_of_workers_are_ahead(
    stubs: Stubs, temporal: Client, stack: Stack
) -> None:
    async with running(temporal, stack.state_dir, ends_early=True):
        created = await create(stubs, lines_of(2), window=timedelta(minutes=5))
        status = await stubs.end(created.batch_id)
    assert (status.state, reason_of(status)) == (batch_pb2.BATCH_STATE_EXPIRED, "WINDOW_OVER")
    assert status.counts.expired == 2


async def test_all_bad_lines_are_named_at_once_and_nothing_runs(stubs: Stubs) -> None:
    lines = lines_of(150)
    for index in range(0, 150, 2):
        lines[index]["params"] = {"top_p": 7}
    lines[1]["body"]["model"] = "nobody"
    content = to_jsonl(lines) + b"{no json\n"
    created = await create(stubs, content)
    status = await stubs.end(created.batch_id)
    assert status.state == batch_pb2.BATCH_STATE_FAILED
    assert reason_of(status) == "INVALID_INPUT"
    assert status.bad_lines == 77
    bad: error_details_pb2.BadRequest = unpack(status.error)["BadRequest"]
    fields = [violation.field for violation in bad.field_violations]
    assert fields[:3] == ["lines[0].params.top_p", "lines[1].body.model", "lines[2].params.top_p"]
    assert "lines[150]" in fields
    assert not status.HasField("output")
    assert len(await stubs.read(status.errors)) == 77
    assert [item.index for item in await stubs.results(created.batch_id)] == [0, 1, *range(2, 151, 2)]


@pytest.mark.parametrize(("content", "words"), [(b"", "at least one line"), (b" \n\n", "at least one line")])
async def test_an_input_without_lines_fails(stubs: Stubs, content: bytes, words: str) -> None:
    created = await create(stubs, content)
    status = await stubs.end(created.batch_id)
    assert (status.state, reason_of(status)) == (batch_pb2.BATCH_STATE_FAILED, "INVALID_INPUT")
    assert words in status.error.message


async def test_a_repeat_finds_the_batch_and_another_one_is_refused(
    stubs: Stubs, temporal: Client, stack: Stack
) -> None:
    batch = await new_batch(stubs, lines_of(3))
    async with running(temporal, stack.state_dir):
        created = await stubs.create(batch)
        assert created.batch_id == batch_workflow_id(batch.user_id, batch.request_id)
        assert (await stubs.create(batch)).batch_id == created.batch_id
        await stubs.end(created.batch_id)
    # The batch has a copy of its input.
    await delete(stubs.files, batch.input.file_id)
    assert (await stubs.create(batch)).state == batch_pb2.BATCH_STATE_SUCCEEDED
    batch.max_concurrent = 3
    assert await refusal(stubs.create(batch)) == ("ALREADY_EXISTS", "REQUEST_ID_REUSED")
    batch.request_id = "another"
    assert await refusal(stubs.create(batch)) == ("NOT_FOUND", "FILE_NOT_FOUND")


async def test_what_no_batch_is_is_refused(stubs: Stubs) -> None:
    missing = batch_workflow_id("nobody", "nothing")
    for call in (stubs.get(missing), stubs.cancel(missing), stubs.results(missing)):
        assert await refusal(call) == ("NOT_FOUND", "BATCH_NOT_FOUND")
    with pytest.raises(grpc.aio.AioRpcError) as error:
        await stubs.create(batch_pb2.BatchRequest(max_failure_rate=2))
    fields = {violation.field for violation in details_of(error.value)["BadRequest"].field_violations}
    assert {"batch.user_id", "batch.request_id", "batch.input.file_id", "batch.max_failure_rate"} <= fields


async def test_the_output_of_a_job_may_be_the_input_of_a_batch(stubs: Stubs, stub: LlmServiceStub) -> None:
    """It is read, although this one holds no line of a batch."""
    seen = await run_job(stub, new_job("[[wide]]", params={"max_tokens": 300}))
    assert seen.final.result.output_file.file_id
    batch = batch_pb2.BatchRequest(user_id="alice", request_id=f"of-{seen.final.status.workflow_id}"[:128])
    batch.input.file_id = seen.final.result.output_file.file_id
    status = await stubs.end((await stubs.create(batch)).batch_id)
    assert (status.state, reason_of(status)) == (batch_pb2.BATCH_STATE_FAILED, "INVALID_INPUT")


async def test_too_many_failures_stop_a_batch(stubs: Stubs, temporal: Client, stack: Stack) -> None:
    async with running(temporal, stack.state_dir, failing=frozenset(range(0, 2000, 2))):
        created = await create(stubs, lines_of(2000), max_failure_rate=0.2, max_concurrent=1)
        status = await stubs.end(created.batch_id)
    assert (status.state, reason_of(status)) == (batch_pb2.BATCH_STATE_FAILED, "TOO_MANY_FAILURES")
    assert status.counts.cancelled > 0
    assert status.counts.failed + status.counts.succeeded + status.counts.cancelled == 2000
    assert len(await stubs.read(status.output)) == status.counts.succeeded


async def test_a_budget_is_exact_to_the_token(stubs: Stubs, temporal: Client) -> None:
    created = await create(stubs, long_lines(100, 20), budget={"output_tokens": 1010})
    status = await stubs.end(created.batch_id)
    assert (status.state, reason_of(status)) == (batch_pb2.BATCH_STATE_FAILED, "BUDGET_SPENT")
    assert status.usage.output_tokens == 1010
    assert (status.counts.succeeded, status.counts.failed, status.counts.cancelled) == (50, 1, 49)
    items = by_index(await stubs.results(created.batch_id))
    (cut,) = [item for item in items.values() if item.state == llm_pb2.JOB_STATE_FAILED]
    assert (cut.result.metadata.output_tokens, unpack(cut.error)["ErrorInfo"].reason) == (10, "BUDGET_SPENT")
    for history in await runs_of(temporal, created.batch_id):
        await replay(history)


async def test_a_budget_that_suffices_to_the_token_stops_nothing(stubs: Stubs) -> None:
    created = await create(stubs, long_lines(50, 20), budget={"output_tokens": 1000})
    status = await stubs.end(created.batch_id)
    assert (status.state, status.usage.output_tokens) == (batch_pb2.BATCH_STATE_SUCCEEDED, 1000)


async def test_a_budget_of_costs_needs_prices(stubs: Stubs) -> None:
    created = await create(stubs, lines_of(2, model="docstrings"), budget={"cost_micros": 1000})
    status = await stubs.end(created.batch_id)
    bad: error_details_pb2.BadRequest = unpack(status.error)["BadRequest"]
    fields = [violation.field for violation in bad.field_violations]
    assert fields == ["lines[0].model", "lines[1].body.model"]


def long_lines(count: int, tokens: int) -> list[dict[str, Any]]:
    """Return lines of a GPU worker's model, whose answers have exactly so many tokens."""
    return [
        {"request_id": f"{number}", "model": "docstrings", "prompt": f"Say {number}.", "params": {"max_tokens": tokens}}
        for number in range(count)
    ]


async def test_a_budget_of_money_needs_models_with_prices(stubs: Stubs) -> None:
    """Nothing would bound such a batch. See the budget of a job, which is refused for this, too."""
    status = await stubs.end((await create(stubs, lines_of(2), budget={"cost_micros": 5})).batch_id)
    assert status.state == batch_pb2.BATCH_STATE_FAILED
    fields = {found.field for found in unpack(status.error)["BadRequest"].field_violations}
    assert fields == {"lines[0].model", "lines[1].body.model"}


async def test_batches_are_listed(stubs: Stubs, temporal: Client, stack: Stack) -> None:
    async with running(temporal, stack.state_dir):
        first = await create(stubs, lines_of(2), "lister")
        await stubs.end(first.batch_id)
    second = await create(stubs, b"{}\n", "lister", project_id="p")
    await stubs.end(second.batch_id)
    open_one = await create(stubs, lines_of(2), "lister")

    async def listed(**filters: Any) -> list[str]:
        found: list[str] = []
        token = ""
        while True:
            request = batch_pb2.ListBatchesRequest(user_id="lister", page_size=1, page_token=token, **filters)
            page = await stubs.batches.ListBatches(request, timeout=PATIENCE)
            found += [status.batch_id for status in page.batches]
            if not (token := page.next_page_token):
                return found

    async def all_listed() -> bool:
        return sorted(await listed()) == sorted([first.batch_id, second.batch_id, open_one.batch_id])

    await until(all_listed)
    assert await listed(states=["BATCH_STATE_SUCCEEDED"]) == [first.batch_id]
    assert await listed(states=["BATCH_STATE_FAILED"]) == [second.batch_id]
    assert await listed(project_id="p") == [second.batch_id]
    await until(lambda: has_state(stubs, open_one.batch_id, batch_pb2.BATCH_STATE_RUNNING))
    await stubs.cancel(open_one.batch_id)
    assert (await stubs.end(open_one.batch_id)).counts.cancelled == 2


async def test_a_batch_of_two_thousand_lines_has_a_small_history(stubs: Stubs, temporal: Client, stack: Stack) -> None:
    """The stack's settings make several runs of its workflow, and several manifests."""
    async with running(temporal, stack.state_dir, compact=False):
        created = await create(stubs, lines_of(2000), "long")
        reading = asyncio.create_task(stubs.results(created.batch_id))
        status = await stubs.end(created.batch_id)
        assert sorted(by_index(await reading)) == list(range(2000))
    assert status.counts.succeeded == 2000
    assert (status.create_time, status.trace_id) == (created.create_time, created.trace_id)
    runs = await runs_of(temporal, created.batch_id)
    assert len(runs) >= 4
    # 50 chunks take six events each. 5,000 events for 50,000 lines would be 200 here, with chunks of 128.
    assert sum(len(history.events) for history in runs) < 50 * 6 + 20 * len(runs) + 100
    for history in runs:
        await replay(history)
    scheduled = [event.activity_task_scheduled_event_attributes for history in runs for event in history.events]
    queues = {one.activity_type.name: one.task_queue.name for one in scheduled if one.activity_id}
    # Steps that take minutes keep no other step waiting.
    assert {queues[name] for name in ("PlanBatch", "MergeBatch")} == {f"{names.WORKFLOW_QUEUE}.batches"}
    assert queues["CleanBatch"] == names.WORKFLOW_QUEUE
    handle = temporal.get_workflow_handle(created.batch_id)
    record = await handle.query(names.QUERY_GET_RECORD, result_type=internal_pb2.BatchRecord)
    assert record.written_chunks
    assert not record.begun_chunks
    listed = await stubs.batches.ListBatches(batch_pb2.ListBatchesRequest(user_id="long"), timeout=PATIENCE)
    assert [found.batch_id for found in listed.batches] == [created.batch_id]


async def runs_of(temporal: Client, batch_id: str) -> list[WorkflowHistory]:
    """Return the histories of all runs of a batch's workflow, the last one first."""
    run_id, found = None, list[WorkflowHistory]()
    while run_id is None or run_id:
        found.append(await temporal.get_workflow_handle(batch_id, run_id=run_id).fetch_history())
        run_id = found[-1].events[0].workflow_execution_started_event_attributes.continued_execution_run_id
    return found


async def replay(history: WorkflowHistory) -> None:
    """Run the workflow's code on a history, in the sandbox, which refuses code that is not deterministic."""
    replayer = Replayer(workflows=[LLMBatchWorkflow], workflow_runner=SANDBOX, data_converter=data_converter)
    await replayer.replay_workflow(history)


async def test_a_gpu_worker_runs_a_batch(stubs: Stubs) -> None:
    created = await create(stubs, lines_of(200, model="docstrings"), max_failure_rate=0.5)
    reading = asyncio.create_task(stubs.results(created.batch_id))
    status = await stubs.end(created.batch_id)
    assert status.state == batch_pb2.BATCH_STATE_SUCCEEDED, status
    assert (status.counts.total, status.counts.succeeded) == (200, 200)
    output = await stubs.read(status.output)
    assert len(output) == 200
    assert output[0]["result"]["output"]
    items = by_index(await reading)
    assert sorted(items) == list(range(200))
    used = sum(item.result.metadata.output_tokens for item in items.values())
    assert status.usage.output_tokens == used > 0


async def test_watched_items_have_a_part_of_the_budget(stubs: Stubs) -> None:
    lines = [{**line, "watch": True} for line in long_lines(30, 20)]
    created = await create(stubs, lines, budget={"output_tokens": 510})
    status = await stubs.end(created.batch_id)
    assert (status.state, reason_of(status)) == (batch_pb2.BATCH_STATE_FAILED, "BUDGET_SPENT")
    assert status.usage.output_tokens == 510
    assert (status.counts.succeeded, status.counts.failed, status.counts.cancelled) == (25, 1, 4)
