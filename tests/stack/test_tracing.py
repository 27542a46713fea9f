"""One trace from the client's call to the GPU and the webhook, as a collector receives it.

All tests examine one run of the stack: jobs of every kind, after which all processes stop and export their last spans.
A tree therefore has every span of its trace.
"""

import asyncio
import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
from opentelemetry.proto.trace.v1 import trace_pb2
from yarl import URL

from services.gpu_worker.engines.simulated import EARLY_SECONDS
from tests.support.blocks import Block, blocks
from tests.support.otlp import Caller, Span
from tests.support.paths import ROOT
from tests.support.receivers import Receiver
from tests.support.traced_run import BATCH_LINES, MANY, MARKER, SECRET, SERVICES, Traced, run_everything

DOCUMENTED = [block for block in blocks() if block.language == "trace"]


@pytest.fixture(scope="module")
async def traced(tmp_path_factory: pytest.TempPathFactory, receiver: Receiver) -> Traced:
    return await run_everything(tmp_path_factory.mktemp("traced"), receiver)


def test_a_job_is_one_trace(traced: Traced) -> None:
    """Every span from the client's to the notifier's is below the span that caused it."""
    assert traced.tree("succeeded") == [
        "llm.v1.LlmService/Submit (OK)",
        "  StartWorkflow:LLMJobWorkflow",
        "    RunWorkflow:LLMJobWorkflow",
        "      StartActivity:RunLLMOnGPU",
        "        RunActivity:RunLLMOnGPU (attempt 1, length)",
        "          text_completion docstrings (length)",
        "      StartActivity:ForgetFeed",
        "        RunActivity:ForgetFeed",
        "      StartActivity:NotifyUI",
        "        RunActivity:NotifyUI",
        "          POST (200)",
    ]


def test_a_retry_is_linked_to_the_attempt_before(traced: Traced) -> None:
    assert traced.tree("retried") == [
        "llm.v1.LlmService/Submit (OK)",
        "  StartWorkflow:LLMJobWorkflow",
        "    RunWorkflow:LLMJobWorkflow",
        "      StartActivity:RunLLMOnGPU",
        "        RunActivity:RunLLMOnGPU (attempt 1, error, ERROR ENGINE_FAILED)",
        "          text_completion docstrings (ERROR ENGINE_FAILED)",
        "        RunActivity:RunLLMOnGPU (attempt 2, length, linked)",
        "          text_completion docstrings (length)",
        "      StartActivity:ForgetFeed",
        "        RunActivity:ForgetFeed",
    ]
    first, second = attempts(traced, "retried")
    assert second.links == [(first.trace_id, first.id)]


def test_a_job_that_fails_says_so_on_its_way_up(traced: Traced) -> None:
    assert traced.tree("failed") == [
        "llm.v1.LlmService/Submit (OK)",
        "  StartWorkflow:LLMJobWorkflow",
        "    RunWorkflow:LLMJobWorkflow (ERROR)",
        "      StartActivity:RunLLMOnGPU",
        "        RunActivity:RunLLMOnGPU (attempt 1, error, ERROR OUT_OF_MEMORY)",
        "          text_completion docstrings (ERROR OUT_OF_MEMORY)",
        "        RunActivity:RunLLMOnGPU (attempt 2, error, ERROR OUT_OF_MEMORY, linked)",
        "          text_completion docstrings (ERROR OUT_OF_MEMORY)",
        "        RunActivity:RunLLMOnGPU (attempt 3, error, ERROR OUT_OF_MEMORY, linked)",
        "          text_completion docstrings (ERROR OUT_OF_MEMORY)",
        "      StartActivity:ForgetFeed",
        "        RunActivity:ForgetFeed",
    ]
    first, second, third = attempts(traced, "failed")
    assert (second.links, third.links) == ([(first.trace_id, first.id)], [(second.trace_id, second.id)])


def test_a_batch_is_one_trace_that_leads_to_some_of_its_items(traced: Traced) -> None:
    """The trace has a span for each chunk and none for an item, of which a few have a trace of their own."""
    batch = traced.spans.of(traced.batch.trace_id)
    names = [span.name for span in batch]
    assert names[0] == "llm.v1.BatchService/CreateBatch"
    assert names.count("RunWorkflow:LLMBatchWorkflow") == 1
    assert not [name for name in names if "docstrings" in name or name == "BatchItem"]
    chunks = [span for span in batch if span.name == "RunActivity:RunBatchChunk"]
    assert sum(int(span.attributes["llm.batch.chunk.items"]) for span in chunks) == BATCH_LINES
    lines = set()
    for chunk in chunks:
        assert len(chunk.links) == 8
        for trace_id, span_id in chunk.links:
            item, generation = traced.spans.of(trace_id)
            assert (item.id, item.parent_id, item.links) == (span_id, "", [(chunk.trace_id, chunk.id)])
            assert (generation.parent_id, generation.attributes["gen_ai.request.model"]) == (item.id, "docstrings")
            lines.add(item.attributes["llm.batch.item"])
    assert len(lines) == 8 * len(chunks) < BATCH_LINES


def test_a_cancelled_job(traced: Traced) -> None:
    """Attempt and generation are cancelled. The Cancel call is a separate trace."""
    assert traced.tree("cancelled") == [
        "llm.v1.LlmService/Submit (OK)",
        "  StartWorkflow:LLMJobWorkflow",
        "    RunWorkflow:LLMJobWorkflow (ERROR)",
        "      StartActivity:RunLLMOnGPU",
        "        RunActivity:RunLLMOnGPU (attempt 1, cancelled)",
        "          text_completion docstrings (cancelled)",
        "      StartActivity:ForgetFeed",
        "        RunActivity:ForgetFeed",
        "      StartActivity:RequestCancel",
        "        RunActivity:RequestCancel",
    ]
    (workflow,) = traced.spans.named(traced.jobs["cancelled"].submit.trace_id, "RunWorkflow:LLMJobWorkflow")
    assert workflow.raw.status.message == "CancelledError: enough"
    assert traced.call("cancel")[:3] == [
        "llm.v1.LlmService/Cancel (OK, linked)",
        "  SignalWorkflow:Cancel",
        "    HandleSignal:Cancel",
    ]
    assert_linked_to_job(traced, "cancel", "cancelled", "llm.v1.LlmService/Cancel")


def test_a_worker_killed_in_the_middle(traced: Traced) -> None:
    """The attempt's span is lost with its process. The next attempt's link has its number and its tokens."""
    assert traced.tree("killed") == [
        "llm.v1.LlmService/Submit (OK)",
        "  StartWorkflow:LLMJobWorkflow",
        "    RunWorkflow:LLMJobWorkflow",
        "      StartActivity:RunLLMOnGPU",
        "        RunActivity:RunLLMOnGPU (attempt 2, length, linked)",
        "          text_completion docstrings (length)",
        "      StartActivity:ForgetFeed",
        "        RunActivity:ForgetFeed",
    ]
    (attempt,) = attempts(traced, "killed")
    (link,) = attempt.raw.links
    linked = {item.key: item.value.int_value for item in link.attributes}
    assert link.trace_id == attempt.raw.trace_id
    assert linked["llm.job.attempt"] == 1
    (generation,) = traced.spans.named(attempt.trace_id, "text_completion docstrings")
    assert linked["llm.job.continued_tokens"] + generation.attributes["gen_ai.usage.output_tokens"] == 400


def test_a_worker_that_stops_hands_the_job_over(traced: Traced) -> None:
    """It exports its spans before its end. The link leads from one activity to the next."""
    assert traced.tree("stopped") == [
        "llm.v1.LlmService/Submit (OK)",
        "  StartWorkflow:LLMJobWorkflow",
        "    RunWorkflow:LLMJobWorkflow",
        "      StartActivity:RunLLMOnGPU",
        "        RunActivity:RunLLMOnGPU (attempt 1, error, ERROR WORKER_SHUTDOWN)",
        "          text_completion docstrings (cancelled)",
        "      StartActivity:RunLLMOnGPU",
        "        RunActivity:RunLLMOnGPU (attempt 1, length, linked)",
        "          text_completion docstrings (length)",
        "      StartActivity:ForgetFeed",
        "        RunActivity:ForgetFeed",
    ]
    before, after = attempts(traced, "stopped")
    assert after.links == [(before.trace_id, before.id)]
    assert (before.attributes["llm.job.handovers"], after.attributes["llm.job.handovers"]) == (0, 1)


def test_a_webhook_that_is_taken_at_the_second_try(traced: Traced) -> None:
    """Each attempt is a separate activity, because the workflow decides when to retry."""
    assert traced.tree("notified again") == [
        "llm.v1.LlmService/Submit (OK)",
        "  StartWorkflow:LLMJobWorkflow",
        "    RunWorkflow:LLMJobWorkflow",
        "      StartActivity:RunLLMOnGPU",
        "        RunActivity:RunLLMOnGPU (attempt 1, length)",
        "          text_completion docstrings (length)",
        "      StartActivity:ForgetFeed",
        "        RunActivity:ForgetFeed",
        "      StartActivity:NotifyUI",
        "        RunActivity:NotifyUI (ERROR DELIVERY_FAILED)",
        "          POST (503, ERROR 503)",
        "      StartActivity:NotifyUI",
        "        RunActivity:NotifyUI",
        "          POST (200)",
    ]
    assert traceparents(traced, "/again") == tries(traced, traced.jobs["notified again"].submit)


def test_a_delivery_that_outlives_its_job(traced: Traced) -> None:
    """The receiver's Retry-After is longer than the job stays open, so the delivery workflow retries."""
    assert traced.tree("left") == [
        "llm.v1.LlmService/Submit (OK)",
        "  StartWorkflow:LLMJobWorkflow",
        "    RunWorkflow:LLMJobWorkflow",
        "      StartActivity:RunLLMOnGPU",
        "        RunActivity:RunLLMOnGPU (attempt 1, length)",
        "          text_completion docstrings (length)",
        "      StartActivity:ForgetFeed",
        "        RunActivity:ForgetFeed",
        "      StartActivity:NotifyUI",
        "        RunActivity:NotifyUI (ERROR DELIVERY_FAILED)",
        "          POST (503, ERROR 503)",
        "      StartChildWorkflow:LLMDeliveryWorkflow",
        "        RunWorkflow:LLMDeliveryWorkflow",
        "          StartActivity:NotifyUI",
        "            RunActivity:NotifyUI",
        "              POST (200)",
    ]
    assert traceparents(traced, "/left")[:2] == tries(traced, traced.jobs["left"].submit)


def test_a_webhook_that_refuses(traced: Traced) -> None:
    (delivery,) = traced.spans.named(traced.jobs["refused"].submit.trace_id, "RunActivity:NotifyUI")
    assert delivery.failed
    assert delivery.attributes["error.type"] == "DELIVERY_REFUSED"
    assert "410" in delivery.raw.status.message
    (post,) = traced.spans.named(delivery.trace_id, "POST")
    assert post.parent_id == delivery.id
    assert post.failed
    assert post.attributes["error.type"] == "410"
    assert post.attributes["http.response.status_code"] == 410


def test_a_webhooks_request_is_described_by_the_conventions(traced: Traced, receiver: Receiver) -> None:
    """Path and query of its URL are left out, because they are secrets at many services."""
    (post,) = traced.spans.named(traced.jobs["succeeded"].submit.trace_id, "POST")
    assert post.raw.kind == trace_pb2.Span.SPAN_KIND_CLIENT
    assert post.attributes == {
        "http.request.method": "POST",
        "url.full": receiver.url,
        "server.address": "127.0.0.1",
        "server.port": URL(receiver.url).port,
        "http.response.status_code": 200,
    }


def test_a_slow_receiver_shows(traced: Traced) -> None:
    """The request's span lasts until the receiver answers or the timeout of the webhook ends."""
    trace = traced.jobs["not answered"].submit.trace_id
    (post, *_) = traced.spans.named(trace, "POST")
    assert post.failed
    assert post.attributes["error.type"] == "TimeoutError"
    assert "http.response.status_code" not in post.attributes
    assert post.seconds > 0.9, "NOTIFIER_WEBHOOK_TIMEOUT is 1 s"


def test_a_hundred_jobs_at_once_do_not_mix(traced: Traced) -> None:
    """Each job's trace is whole and has no span of another job.

    On a small machine so many jobs may make Temporal repeat a step, whose spans are then in the trace twice.
    """
    tree = traced.spans.tree(traced.jobs["succeeded"].submit, lambda _: "")
    # Only that job names a webhook.
    expected = [line for line in tree if "NotifyUI" not in line and line.strip() != "POST"]
    for job in traced.many:
        assert set(traced.spans.tree(job.submit, lambda _: "")) == set(expected)
        spans = traced.spans.of(job.submit.trace_id)
        assert {span.attributes.get("temporalWorkflowID", job.id) for span in spans} == {job.id}
        for generation in traced.spans.named(job.submit.trace_id, "text_completion docstrings"):
            made = job.seen.final.result.metadata.output_tokens
            assert generation.attributes["gen_ai.request.max_tokens"] == made, "the generation belongs to another job"
    assert len({job.submit.trace_id for job in traced.many}) == MANY


def test_spans_last_as_long_as_what_they_stand_for(traced: Traced) -> None:
    """A workflow's span includes its activities. The engine generates the first of 20 tokens immediately."""
    trace = traced.jobs["succeeded"].submit.trace_id
    (workflow,) = traced.spans.named(trace, "RunWorkflow:LLMJobWorkflow")
    (attempt,) = attempts(traced, "succeeded")
    (generation,) = traced.spans.named(trace, "text_completion docstrings")
    assert workflow.seconds > attempt.seconds > generation.seconds > 19 / 200 - EARLY_SECONDS
    waited = generation.attributes["gen_ai.response.time_to_first_chunk"]
    assert 0 < waited < generation.seconds


def test_each_process_has_its_name(traced: Traced) -> None:
    spans = traced.spans.of(traced.jobs["succeeded"].submit.trace_id)
    services = {span.service: [] for span in spans}
    for span in spans:
        services[span.service].append(span.name)
    assert services["gpu-worker"] == ["RunActivity:RunLLMOnGPU", "text_completion docstrings"]
    assert services["notifier"] == ["RunActivity:NotifyUI", "POST"]
    assert set(services) == {"gateway", "gpu-worker", "notifier"}


def test_a_generation_is_described_by_the_conventions(traced: Traced) -> None:
    (span,) = traced.spans.named(traced.jobs["succeeded"].submit.trace_id, "text_completion docstrings")
    metadata = traced.jobs["succeeded"].seen.final.result.metadata
    told = dict(span.attributes)
    del told["gen_ai.response.time_to_first_chunk"]
    assert told == {
        "gen_ai.operation.name": "text_completion",
        "gen_ai.provider.name": "simulated",
        "gen_ai.request.model": "docstrings",
        "gen_ai.request.max_tokens": 20,
        "gen_ai.response.model": "docstrings",
        "gen_ai.response.finish_reasons": ["length"],
        "gen_ai.output.type": "text",
        "gen_ai.usage.input_tokens": metadata.prompt_tokens,
        "gen_ai.usage.output_tokens": 20,
    }


def test_a_webhook_carries_the_trace_on(traced: Traced) -> None:
    (request,) = traced.webhooks
    job = traced.jobs["succeeded"]
    (post,) = traced.spans.named(job.submit.trace_id, "POST")
    assert request.headers["traceparent"] == f"00-{job.submit.trace_id}-{post.id}-01"
    assert request.event["data"]["status"]["traceId"] == job.submit.trace_id


def test_submit_and_every_status_tell_the_trace(traced: Traced) -> None:
    for job in [*traced.jobs.values(), *traced.many]:
        assert job.trailing == {"trace-id": job.submit.trace_id}
        assert job.response.status.trace_id == job.submit.trace_id
        told = {message.status.trace_id for message in job.seen.messages if message.HasField("status")}
        assert told == {job.submit.trace_id}


def test_a_repeated_submit_tells_the_first_ones_trace(traced: Traced) -> None:
    """The repeated call itself is another trace, with a link."""
    again = traced.again
    assert again.trailing == {"trace-id": again.response.status.trace_id}
    assert again.response.status.trace_id != again.submit.trace_id
    (call,) = traced.spans.named(again.submit.trace_id, "llm.v1.LlmService/Submit")
    assert [trace_id for trace_id, _ in call.links] == [again.response.status.trace_id]


@pytest.mark.parametrize(("call", "method"), [("stream", "StreamStatus"), ("status", "GetStatus")])
def test_a_later_call_is_its_own_trace_linked_to_the_jobs(traced: Traced, call: str, method: str) -> None:
    assert traced.call(call) == [f"llm.v1.LlmService/{method} (OK, linked)"]
    assert_linked_to_job(traced, call, "succeeded", f"llm.v1.LlmService/{method}")


def test_a_later_call_that_asks_the_workflow(traced: Traced) -> None:
    """A cancelled job's output is not in Temporal's closing event, so the gateway queries the workflow."""
    assert traced.call("partial") == [
        "llm.v1.LlmService/GetStatus (OK, linked)",
        "  QueryWorkflow:GetStatus",
        "    HandleQuery:GetStatus",
    ]
    assert_linked_to_job(traced, "partial", "cancelled", "llm.v1.LlmService/GetStatus")


def test_deliveries_sent_again_are_a_trace_of_their_own(traced: Traced) -> None:
    """The trace is linked to the job's. The webhook gets the trace of the Redeliver call."""
    assert traced.call("redeliver") == [
        "llm.v1.LlmService/Redeliver (OK, linked)",
        *["  QueryWorkflow:GetDeliveries", "    HandleQuery:GetDeliveries"] * 2,
        "  SignalWithStartWorkflow:LLMDeliveryWorkflow",
        "    HandleSignal:Redeliver",
        "      StartActivity:NotifyUI",
        "        RunActivity:NotifyUI",
        "          POST (200)",
        "    RunWorkflow:LLMDeliveryWorkflow",
    ]
    assert_linked_to_job(traced, "redeliver", "left", "llm.v1.LlmService/Redeliver")
    assert traceparents(traced, "/left")[2:] == tries(traced, traced.calls["redeliver"])


def test_the_log_of_deliveries_is_linked_to_the_job(traced: Traced) -> None:
    """The delivery workflow answers the call."""
    assert traced.call("deliveries") == [
        "llm.v1.LlmService/ListDeliveries (OK, linked)",
        "  QueryWorkflow:GetDeliveries",
        "    HandleQuery:GetDeliveries",
    ]
    assert_linked_to_job(traced, "deliveries", "left", "llm.v1.LlmService/ListDeliveries")


def test_a_list_belongs_to_no_job(traced: Traced) -> None:
    root, *others = traced.call("list")
    assert root == "llm.v1.LlmService/List (OK)"
    # A job that has no attempt at this moment answers itself.
    assert {line.strip() for line in others} <= {"QueryWorkflow:GetStatus", "HandleQuery:GetStatus"}


def test_a_call_for_no_job(traced: Traced) -> None:
    """NOT_FOUND is not an error of the server."""
    assert traced.call("not found") == ["llm.v1.LlmService/GetStatus (NOT_FOUND)"]


def test_prompts_and_outputs_stay_out(traced: Traced) -> None:
    captured = traced.jobs["captured"].submit.trace_id
    spans = [span for span in traced.spans.all if span.trace_id != captured]
    text = "\n".join(str(span.raw) for span in spans)
    assert MARKER not in text
    for job in traced.many:
        assert job.seen.final.result.output not in text


def test_prompts_and_outputs_are_captured_where_a_setting_says_so(traced: Traced) -> None:
    job = traced.jobs["captured"]
    (span,) = traced.spans.named(job.submit.trace_id, "text_completion idle")
    sides = (("input", "user", f"{MARKER} "), ("output", "assistant", job.seen.final.result.output))
    for side, role, text in sides:
        (message,) = json.loads(span.attributes[f"gen_ai.{side}.messages"])
        assert message == {"role": role, "parts": [{"type": "text", "content": text}]}


def test_secrets_stay_out(traced: Traced) -> None:
    assert SECRET not in str([span.raw for span in traced.spans.all])


def test_every_line_of_the_log_is_json(traced: Traced) -> None:
    lines = [line for name in SERVICES for line in traced.logs[name].splitlines()]
    assert [line for line in lines if not line.startswith('{"time": "')] == []


def test_the_log_tells_the_same_story(traced: Traced) -> None:
    """The log has one line for each event, with the job's trace."""
    job = traced.jobs["retried"]
    lines = [line for line in traced.lines("retried") if not line["logger"].startswith("temporalio.activity")]
    assert [(line["message"], line.get("attempt")) for line in lines] == [
        ("job accepted", None),
        ("attempt started", 1),
        ("attempt ended", 1),
        ("attempt started", 2),
        ("attempt ended", 2),
        ("job ended", None),
    ]
    assert {line["trace_id"] for line in lines} == {job.submit.trace_id}
    assert {line["run_id"] for line in lines} == {job.response.run_id}
    assert lines[2] | {"finish_reason": "FINISH_REASON_ERROR", "output_tokens": 3} == lines[2]
    assert lines[-1]["state"] == "JOB_STATE_SUCCEEDED"


def test_the_log_tells_what_else_happens(traced: Traced) -> None:
    def told(name: str) -> dict[str, dict[str, Any]]:
        return {line["message"]: line for line in traced.lines(name)}

    assert told("cancelled")["cancel asked for"]["trace_id"] == traced.calls["cancel"].trace_id
    assert told("succeeded")["delivered"]["trace_id"] == traced.jobs["succeeded"].submit.trace_id
    refused = "not delivered: the webhook answered 410: it is gone for good"
    assert told("refused")[refused]["error"] == "DELIVERY_REFUSED"
    failed = next(
        line for message, line in told("retried").items() if message.startswith("Completing activity as failed")
    )
    assert "ENGINE_FAILED" in failed["message"]
    assert "exception" not in failed, "a failed job is an outcome, not a fault of the process"


def test_the_log_holds_no_prompt_output_or_secret(traced: Traced) -> None:
    for name, log in traced.logs.items():
        assert MARKER not in log, name
        assert SECRET not in log, name
        for job in [*traced.many, *traced.jobs.values()]:
            output = job.seen.final.result.output
            assert output not in log
            assert json.dumps(output)[1:-1] not in log


REPLAY = """
import asyncio, pathlib, sys
from opentelemetry import trace
from opentelemetry.sdk.trace import SpanProcessor
from temporalio.client import WorkflowHistory
from temporalio.contrib.opentelemetry import OpenTelemetryPlugin
from temporalio.worker import Replayer, UnsandboxedWorkflowRunner
from workflows.llm_delivery import LLMDeliveryWorkflow
from workflows.llm_job import LLMJobWorkflow
from payload_converter import data_converter
from runtime import telemetry, temporal

class Counter(SpanProcessor):
    started = ended = 0
    def on_start(self, span, parent_context=None): self.started += 1
    def on_end(self, span): self.ended += 1

async def main():
    await Replayer(
        workflows=[LLMJobWorkflow, LLMDeliveryWorkflow],
        data_converter=data_converter,
        workflow_runner=UnsandboxedWorkflowRunner(),
        plugins=[OpenTelemetryPlugin(add_temporal_spans=True)],
    ).replay_workflow(WorkflowHistory.from_json("replayed", sys.stdin.read()))

with telemetry.tracing("replayer", temporal.new_provider):
    counter = Counter()
    trace.get_tracer_provider().add_span_processor(counter)
    asyncio.run(main())
    print(counter.started, counter.ended)
"""


@pytest.mark.parametrize(
    "block", [block for block in blocks() if block.language == "trace"], ids=lambda block: block.of
)
def test_the_documentation_shows_real_traces(traced: Traced, block: Block) -> None:
    assert traced.tree(block.of) == block.text.splitlines()


@pytest.mark.parametrize(("kind", "begun"), [("LLMJobWorkflow", "3"), ("LLMDeliveryWorkflow", "3")])
async def test_a_replay_adds_no_span(traced: Traced, kind: str, begun: str, tmp_path: Path) -> None:
    """A replay starts spans, so that new spans have a parent, and ends none."""
    path = tmp_path / "history.json"
    path.write_text(traced.histories[kind])
    with path.open() as history:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-c", REPLAY),
            stdin=history,
            stdout=asyncio.subprocess.PIPE,
            cwd=ROOT,
            env={**os.environ, "OTEL_TRACES_EXPORTER": "console"},
        )
        output, _ = await process.communicate()
    assert process.returncode == 0
    assert output.decode().split() == [begun, "0"]


def attempts(traced: Traced, name: str) -> list[Span]:
    return traced.spans.named(traced.jobs[name].submit.trace_id, "RunActivity:RunLLMOnGPU")


def tries(traced: Traced, caller: Caller) -> list[str]:
    """Return the traceparent of each delivery attempt in a trace."""
    spans = traced.spans.named(caller.trace_id, "POST")
    return [f"00-{span.trace_id}-{span.id}-01" for span in spans]


def traceparents(traced: Traced, path: str) -> list[str]:
    """Return the traceparents that the receiver got."""
    return [request.headers["traceparent"] for request in traced.requests[path]]


def assert_linked_to_job(traced: Traced, call: str, job: str, method: str) -> None:
    (span,) = traced.spans.named(traced.calls[call].trace_id, method)
    submit, *_ = traced.spans.of(traced.jobs[job].submit.trace_id)
    assert span.links == [(submit.trace_id, submit.id)]
