"""Jobs run through the whole stack on a real model, as `make demo` shows."""

import asyncio
import json
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import grpc
import pytest

from deploy.local.stack import Stack
from llm_pb import llm_pb2, pipeline_pb2
from llm_pb.llm_pb2_grpc import LlmServiceStub
from llm_pb.pipeline_pb2_grpc import PipelineServiceStub
from runtime.scopes import SCOPES
from services.gateway.models.settings import EMBEDDED_MODEL
from tests.support.commands import run
from tests.support.credentials import CallsAs, KeyFile
from tests.support.engines import vllm_variable
from tests.support.http_fronts import running_front
from tests.support.jobs import assert_not_tried_again, new_job, run_job, unpack, until_output, watch
from tests.support.pipelines import follow, submit
from tests.support.scrapes import scrape, scrape_until
from tests.support.stacks import stack_settings, tool
from tests.support.training import jsonl, sentences
from tests.support.worlds import PAINTER, PAINTER_MODEL, leaves, world_of

GREEDY = {"temperature": 0.0, "max_tokens": 60}
JOBS: dict[str, set[str]] = {
    "refine": {"rounds/1/write", "rounds/1/critique", "edit"},
    "world": leaves(characters=1, posts=1),
    "training": set(),
}
"""Steps of the built-in pipelines that are jobs."""
FIELDS = {
    "refine": ("article", "rounds", "bestRound"),
    "world": ("name", "description", "characters", "posts", "images"),
    "training": ("model", "steps"),
}
"""What the small model's results have."""


@pytest.fixture(scope="module", params=["torch", pytest.param("vllm", marks=pytest.mark.vllm)])
def engine(request: pytest.FixtureRequest) -> str:
    pytest.importorskip(request.param)
    return str(request.param)


@pytest.fixture(scope="module")
async def real_stack(engine: str, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Stack]:
    settings = stack_settings(tmp_path_factory.mktemp(engine), engine=engine)
    only = ("temporal", "nats", "gateway", "gpu-worker", "notifier")
    models = [EMBEDDED_MODEL.model_dump(mode="json", exclude_defaults=True), PAINTER_MODEL]
    environment = {
        "gateway": {"GATEWAY_MODELS": json.dumps(models)},
        "gpu-worker": {"GPU_WORKER_REPORT_INTERVAL": "PT0.5S"},
    }
    if engine == "vllm":
        environment["gpu-worker"]["GPU_WORKER_ENGINE_OPTIONS"] = vllm_variable()
    async with Stack(settings, only=only, environment=environment) as stack:
        yield stack


@pytest.fixture(scope="module")
async def real(real_stack: Stack) -> AsyncIterator[LlmServiceStub]:
    async with grpc.aio.insecure_channel(real_stack.address("gateway")) as channel:
        yield LlmServiceStub(channel)


async def test_a_real_model_answers(real: LlmServiceStub, engine: str) -> None:
    """The answer comes token by token, and greedy decoding generates the same answer again."""
    seen = await run_job(real, new_job("Return the ", params=GREEDY))
    result = seen.final.result
    assert seen.states[-1] == "SUCCEEDED"
    assert seen.output == result.output.encode()
    assert result.metadata.output_tokens == 60
    assert result.metadata.engine == engine
    assert result.metadata.gpu.name
    assert sum(message.HasField("delta") for message in seen.messages) > 3
    again = await run_job(real, new_job("Return the ", params=GREEDY))
    assert again.output == seen.output


async def test_a_budget_ends_a_job_at_the_token(real: LlmServiceStub) -> None:
    """Its output is what max_tokens of as many gives, and it is not tried again."""
    whole = await run_job(real, new_job("Return the ", params={**GREEDY, "max_tokens": 20}))
    seen = await run_job(real, new_job("Return the ", params=GREEDY, budget={"output_tokens": 20}))
    assert seen.states[-1] == "FAILED"
    assert unpack(seen.final.status.error)["ErrorInfo"].reason == "BUDGET_SPENT"
    assert_not_tried_again(seen)
    assert seen.final.result.metadata.output_tokens == 20
    assert seen.output == whole.output == seen.final.result.output.encode()


async def test_jobs_share_the_batch(real: LlmServiceStub) -> None:
    """Every concurrent job gets its own answer, which is the same as without the others."""
    prompts = [f"Return the {word}" for word in ("number", "list", "name", "value", "file", "string", "object", "time")]
    alone = [(await run_job(real, new_job(prompt, params=GREEDY))).output for prompt in prompts[:2]]
    together = await asyncio.gather(*(run_job(real, new_job(prompt, params=GREEDY)) for prompt in prompts))
    assert [seen.output for seen in together[:2]] == alone


async def test_a_conversation_goes_through_the_chat_template(real: LlmServiceStub) -> None:
    messages = [llm_pb2.ChatMessage(role=llm_pb2.ROLE_USER, content="Tell me about `open`.")]
    seen = await run_job(real, new_job(messages=messages, params=GREEDY))
    assert seen.states[-1] == "SUCCEEDED"
    assert seen.output


async def test_a_running_job_is_cancelled(real: LlmServiceStub) -> None:
    params = {"max_tokens": 1900, "min_tokens": 1900}
    id_ = (await real.Submit(llm_pb2.SubmitRequest(job=new_job("Return", params=params)))).workflow_id
    await until_output(real, id_)
    await real.Cancel(llm_pb2.CancelRequest(workflow_id=id_))
    seen = await watch(real, id_)
    assert seen.states[-1] == "CANCELLED"
    assert seen.final.result.output.encode() == seen.output != b""


async def test_the_worker_reports_what_its_engine_does(real: LlmServiceStub, engine: str) -> None:
    """Its batch, its cache and its speed, while a job runs."""
    params = {"max_tokens": 1900, "min_tokens": 1900}
    id_ = (await real.Submit(llm_pb2.SubmitRequest(job=new_job("Return", params=params)))).workflow_id
    async with asyncio.timeout(120):
        while True:
            found = (await real.ListWorkers(llm_pb2.ListWorkersRequest())).workers
            used = [(worker.seats_in_use, worker.running_sequences, worker.waiting_sequences) for worker in found]
            # The jobs of the tests before may still be ending.
            if used == [(1, 1, 0)] and found[0].tokens_per_second and found[0].kv_cache_usage:
                break
            await asyncio.sleep(0.1)
    (worker,) = found
    assert (worker.engine, worker.state) == (engine, llm_pb2.WORKER_STATE_SERVING)
    assert worker.kv_cache_usage < 1
    assert worker.gpu.name
    await real.Cancel(llm_pb2.CancelRequest(workflow_id=id_))
    await watch(real, id_)


async def test_a_prompt_over_the_context_is_refused_at_the_gateway(real: LlmServiceStub) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await real.Submit(llm_pb2.SubmitRequest(job=new_job("Return the number of bits. " * 500)))
    assert refused.value.code() == grpc.StatusCode.INVALID_ARGUMENT


async def test_a_conversation_over_the_context_fails_for_good(real: LlmServiceStub) -> None:
    """The worker counts the template's tokens as well, and fails the job without another attempt."""
    # Each turn costs the gateway one token and the template at least one more.
    messages = [llm_pb2.ChatMessage(role=llm_pb2.ROLE_USER, content="a")] * 1024
    seen = await run_job(real, new_job(messages=messages))
    assert seen.states[-1] == "FAILED"
    assert unpack(seen.final.status.error)["ErrorInfo"].reason == "PROMPT_TOO_LONG"
    assert_not_tried_again(seen)


async def test_only_jobs_of_one_user_of_one_tenant_share_cached_prompts(
    real_stack: Stack, engine: str, tmp_path: Path
) -> None:
    """So the time of a first token tells nothing of what others ask. vLLM itself counts the tokens that it finds."""
    if engine != "vllm":
        pytest.skip("only vLLM caches prompts")
    file = KeyFile(tmp_path / "keys.json")
    keys = {tenant: file.add(SCOPES, tenant=tenant) for tenant in ("acme", "globex", "")}
    gateway = real_stack.add("gateway", {"GATEWAY_API_KEYS_FILE": str(file.path)})
    await gateway.start()
    await gateway.wait_ready()
    prompt = "Return the number of bits. " * 60
    async with grpc.aio.insecure_channel(real_stack.address(gateway.name)) as channel:

        async def found(tenant: str, user_id: str) -> bool:
            """Run a job, and return whether vLLM has found its prompt in the cache."""
            stub: Any = CallsAs(LlmServiceStub(channel), keys[tenant])
            queried, hits = "vllm:prefix_cache_queries_total", "vllm:prefix_cache_hits_total"
            before = await scrape(real_stack, "gpu-worker")
            seen = await run_job(stub, new_job(prompt, user_id=user_id, params={"max_tokens": 1}))
            tokens = seen.final.result.metadata.prompt_tokens
            # Blocks of 128 tokens are cached.
            assert tokens > 256
            after = await scrape_until(
                real_stack, lambda now: now.total(queried) >= before.total(queried) + tokens, "gpu-worker"
            )
            return after.total(hits) > before.total(hits)

        assert [
            await found(tenant, user_id)
            for tenant, user_id in (
                ("acme", "alice"),
                ("acme", "alice"),
                ("globex", "alice"),
                ("acme", "bob"),
                ("", "alice"),
                ("globex", "alice"),
                ("acme", "alice"),
            )
        ] == [False, True, False, False, False, True, True]
    await gateway.terminate()


@pytest.mark.timeout(900)
@pytest.mark.long
async def test_a_world_of_a_real_model_has_texts_and_pictures(real_stack: Stack, engine: str) -> None:
    """The small model fills the forms. What it writes means nothing."""
    if engine != "torch":
        pytest.skip("the small model would fill the forms with white space")
    painter = real_stack.add("gpu-worker", PAINTER)
    await painter.start()
    await painter.wait_ready()
    pipeline = pipeline_pb2.PipelineRequest(user_id="alice", request_id="real")
    pipeline.world.theme = "a harbour in the fog"
    pipeline.world.models["describe"] = "docstrings"
    pipeline.world.MergeFrom(
        pipeline_pb2.WorldSpec(image_model="painter", characters=1, posts=1, seed=3, max_tokens=1500)
    )
    for step in ("describe", "write", "image"):
        pipeline.world.step_timeouts[step].FromSeconds(600)
    async with grpc.aio.insecure_channel(real_stack.address("gateway")) as channel:
        stub: Any = PipelineServiceStub(channel)
        id_ = (await submit(stub, pipeline)).pipeline_id
        seen = await follow(stub, id_, patience=600)
    assert seen.status.state == llm_pb2.JOB_STATE_SUCCEEDED, seen.status.root.error
    world = world_of(seen)
    texts = [world.name, world.description, world.characters[0].name, *(post.text for post in world.posts)]
    assert all(texts)
    assert world.images[0].size_bytes
    assert world.posts[0].image.size_bytes
    assert {path for path, step in seen.steps.items() if step.workflow_id} == leaves(characters=1, posts=1)
    await painter.terminate()


async def called(stack: Stack, method: str, body: dict[str, Any]) -> list[dict[str, Any]]:
    """Call PipelineService by grpcurl, which knows the contract by reflection, and return the messages."""
    arguments = ("-plaintext", "-max-time", "600", "-d", json.dumps(body), stack.address("gateway"))
    ended = await run(tool("grpcurl"), *arguments, f"llm.v1.PipelineService/{method}")
    assert ended.status == 0, ended.errors
    messages, rest, decoder = [], ended.output.lstrip(), json.JSONDecoder()
    while rest:
        message, end = decoder.raw_decode(rest)
        messages.append(message)
        rest = rest[end:].lstrip()
    return messages


async def command(stack: Stack, *arguments: str) -> str:
    """Run durable-llm, and return what it prints."""
    words = (sys.executable, "-m", "durable_llm", *arguments)
    ended = await run(*words, DURABLE_LLM_USER="alice", DURABLE_LLM_ADDRESS=stack.address("gateway"))
    assert ended.status == 0, ended.errors
    return ended.output


async def refinement_spec(_: Stack, __: Path) -> dict[str, Any]:
    return {"topic": "rain", "models": {"write": "docstrings"}, "maxRounds": 1}


async def world_spec(stack: Stack, _: Path) -> dict[str, Any]:
    painter = stack.add("gpu-worker", PAINTER)
    await painter.start()
    await painter.wait_ready()
    timeouts = dict.fromkeys(("describe", "write", "image"), "600s")
    sizes = {"characters": 1, "posts": 1, "seed": 3, "maxTokens": 1500}
    models = {"models": {"describe": "docstrings"}, "imageModel": "painter"}
    return {"theme": "a harbour in the fog", **models, **sizes, "stepTimeouts": timeouts}


async def training_spec(stack: Stack, folder: Path) -> dict[str, Any]:
    trainer = stack.add("trainer", {"TRAINER_DEVICE": "cpu"})
    await trainer.start()
    await trainer.wait_ready()
    (folder / "days.jsonl").write_bytes(jsonl(sentences(60)))
    file_id = (await command(stack, "files", "put", str(folder / "days.jsonl"))).strip()
    sizes = {"steps": 3, "stepTokens": 256}
    return {"baseModel": "docstrings", "model": "tuned", "dataset": {"fileId": file_id}, **sizes}


@pytest.mark.long
@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    ("name", "spec_of"), [("refine", refinement_spec), ("world", world_spec), ("training", training_spec)]
)
async def test_a_built_in_pipeline_of_a_real_model_runs_by_grpcurl_and_is_seen_from_everywhere(
    real_stack: Stack, engine: str, tmp_path: Path, name: str, spec_of: Any
) -> None:
    """The small model fills the forms. What it writes means nothing. The command and the console find the same run."""
    if engine != "torch":
        pytest.skip("the small model would fill the forms with white space")
    spec = await spec_of(real_stack, tmp_path)
    key = {"userId": "alice", "requestId": f"real-{name}"}
    (started,) = await called(real_stack, "SubmitPipeline", {"pipeline": {**key, name: spec}})
    id_ = started["status"]["pipelineId"]
    assert id_ == f"llmpipe-alice-real-{name}"
    messages = await called(real_stack, "StreamPipeline", {"pipelineId": id_})
    last = messages[-1]
    assert last["status"]["state"] == "JOB_STATE_SUCCEEDED", last
    steps = {step["path"]: step for message in messages for step in message.get("steps", ())}
    jobs = {path for path, step in steps.items() if step["kind"] == "STEP_KIND_JOB"}
    result = last["result"]["value"]
    assert jobs >= JOBS[name]
    assert all(steps[path]["state"] == "STEP_STATE_SUCCEEDED" for path in jobs)
    assert all(result.get(field) for field in FIELDS[name]), result

    repeat = ("pipeline", "run", name, json.dumps(spec), "--request-id", f"real-{name}", "-q")
    assert json.loads((await command(real_stack, *repeat)).splitlines()[-1]).items() <= result.items()
    tree = await command(real_stack, "pipeline", "tree", id_)
    assert tree.splitlines()[0] == f"{id_} SUCCEEDED"

    async with running_front(real_stack) as front:
        page = (await front.client.get(f"/console/pipelines/{id_}")).text
        assert "state-succeeded" in page
        for path in jobs:
            link = f"/console/jobs/{quote(f'{id_}/{path}', safe='')}"
            assert f'href="{link}"' in page
            assert (await front.client.get(link)).status_code == 200
