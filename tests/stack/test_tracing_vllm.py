"""vLLM's own spans are in the job's trace, and its log lines are in the worker's log."""

import json
import re
from pathlib import Path

import grpc
import pytest

from deploy.local.stack import Stack
from llm_pb.llm_pb2_grpc import LlmServiceStub
from tests.support.engines import vllm_variable
from tests.support.otlp import Collector
from tests.support.stacks import FAST, stack_settings
from tests.support.traced_run import MARKER, CallingClient, words

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(600)]


async def test_vllms_span_lies_below_the_generation_and_its_log_is_the_workers(tmp_path: Path) -> None:
    pytest.importorskip("vllm")
    kinds = ("temporal", "nats", "gateway", "gpu-worker", "notifier")
    async with Collector() as collector:
        options = vllm_variable(otlp_traces_endpoint=f"http://{collector.address}")
        worker = {**collector.environment, "GPU_WORKER_ENGINE_OPTIONS": options}
        environment = {**FAST, "gateway": FAST["gateway"] | collector.environment, "gpu-worker": worker}
        stack = Stack(stack_settings(tmp_path, engine="vllm"), only=kinds, environment=environment)
        async with stack, grpc.aio.insecure_channel(stack.address("gateway")) as channel:
            job = await CallingClient(LlmServiceStub(channel)).run(params={"max_tokens": 5, "min_tokens": 5})
        log = stack.processes["gpu-worker"].log_path.read_text()
    tree = collector.spans.tree(job.submit, words)
    generation = tree.index("          text_completion docstrings (length)")
    assert tree[generation + 1] == "            llm_request"
    # Torch's native code does not write through Python's logging.
    loggers = {json.loads(line)["logger"] for line in log.splitlines() if line.startswith('{"time": "')}
    assert {"services.gpu_worker.activity", "vllm.config.model", "vllm.v1.engine.core"} <= loggers, (
        "every process of vLLM must log here"
    )
    assert not re.search(r"^\(\w+ pid=\d+\) ", log, re.MULTILINE), "a line has vLLM's own format"
    assert MARKER not in log
