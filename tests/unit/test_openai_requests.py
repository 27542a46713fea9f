"""Requests of OpenAI's clients become jobs; what is not supported is refused by its name, never ignored."""

import re
from typing import Any

import pytest

from jobs.field_rules import Violation
from llm_pb import common_pb2, llm_pb2
from openai_api.asked import Asked, tier_of
from openai_api.batches import read_batch
from openai_api.chat_request import read_chat_request, read_completion_request
from openai_api.errors import InvalidBody
from openai_api.responses_request import read_responses_request
from services.http.openai.openapi import PARAMETERS
from tests.support.paths import ROOT

READ = {"responses": read_responses_request, "chat": read_chat_request, "completions": read_completion_request}
LEAST: dict[str, dict[str, Any]] = {
    "responses": {"model": "m", "input": "Hi"},
    "chat": {"model": "m", "messages": [{"role": "user", "content": "Hi"}]},
    "completions": {"model": "m", "prompt": "Hi"},
}
PATHS = {"responses": "/v1/responses", "chat": "/v1/chat/completions", "completions": "/v1/completions"}
SCHEMA = {"type": "object", "properties": {"b": {"type": "string"}, "a": {"type": "string"}}}


def read(endpoint: str, **parameters: Any) -> Asked:
    return READ[endpoint]({**LEAST[endpoint], **parameters})


def refused(endpoint: str, **parameters: Any) -> str:
    with pytest.raises(InvalidBody) as failure:
        read(endpoint, **parameters)
    return failure.value.violations[0].field


@pytest.mark.parametrize("name", ["input_file_id", "metadata.team"])
def test_half_a_surrogate_pair_is_no_text_of_a_batch(name: str) -> None:
    body: dict[str, Any] = {"input_file_id": "f", "endpoint": PATHS["chat"], "completion_window": "24h"}
    body |= {"input_file_id": "\ud800"} if name == "input_file_id" else {"metadata": {"team": "\ud800"}}
    with pytest.raises(InvalidBody) as failure:
        read_batch(body)
    assert failure.value.violations[0].field == name


def test_a_response_asks_for_a_job() -> None:
    asked = read(
        "responses",
        instructions="Be brief.",
        input=[
            {"role": "developer", "content": "In English."},
            {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "a"}]},
            {"role": "assistant", "id": "msg_1", "content": [{"type": "output_text", "text": "b", "annotations": []}]},
        ],
        max_output_tokens=9,
        temperature=0,
        top_p=0.5,
        top_k=3,
        seed=2**40,
        stop="\n",
        metadata={"team": "x"},
        user="alice",
        background=True,
        stream=True,
        include=["message.output_text.logprobs"],
        top_logprobs=2,
        text={"format": {"type": "json_schema", "name": "n", "schema": SCHEMA, "strict": True}, "verbosity": "medium"},
    )
    assert asked.job == llm_pb2.JobRequest(
        user_id="alice",
        model="m",
        labels={"team": "x"},
        messages=[
            llm_pb2.ChatMessage(role=llm_pb2.ROLE_SYSTEM, content="Be brief."),
            llm_pb2.ChatMessage(role=llm_pb2.ROLE_SYSTEM, content="In English."),
            llm_pb2.ChatMessage(role=llm_pb2.ROLE_USER, content="a"),
            llm_pb2.ChatMessage(role=llm_pb2.ROLE_ASSISTANT, content="b"),
        ],
        params=llm_pb2.SamplingParams(
            max_tokens=9,
            temperature=0,
            top_p=0.5,
            top_k=3,
            seed=2**40,
            stop=["\n"],
            logprobs=2,
            json_schema='{"type":"object","properties":{"b":{"type":"string"},"a":{"type":"string"}}}',
        ),
    )
    assert (asked.background, asked.stream, asked.store) == (True, True, True)
    assert (asked.instructions, asked.format_name) == (True, "n")


def test_a_chat_completion_asks_for_a_job() -> None:
    asked = read(
        "chat",
        messages=[
            {"role": "system", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
            {"role": "assistant", "content": "c", "refusal": None, "tool_calls": None},
        ],
        max_tokens=5,
        logprobs=True,
        stream=True,
        stream_options={"include_usage": True},
        response_format={"type": "json_object"},
        presence_penalty=1,
        frequency_penalty=-1,
        service_tier="priority",
    )
    assert asked.job == llm_pb2.JobRequest(
        model="m",
        job_class=common_pb2.JOB_CLASS_HIGH,
        messages=[
            llm_pb2.ChatMessage(role=llm_pb2.ROLE_SYSTEM, content="a\nb"),
            llm_pb2.ChatMessage(role=llm_pb2.ROLE_ASSISTANT, content="c"),
        ],
        params=llm_pb2.SamplingParams(
            max_tokens=5, logprobs=0, json_schema='{"type":"object"}', presence_penalty=1, frequency_penalty=-1
        ),
    )
    assert asked.include_usage


def test_a_completion_asks_for_a_job() -> None:
    asked = read("completions", prompt=["Hi"], max_tokens=5, logprobs=1, echo=False, best_of=1, n=1, suffix="")
    assert asked.job == llm_pb2.JobRequest(
        model="m", prompt="Hi", params=llm_pb2.SamplingParams(max_tokens=5, logprobs=1)
    )


@pytest.mark.parametrize("endpoint", READ)
def test_null_is_the_same_as_missing(endpoint: str) -> None:
    names = ("temperature", "stop", "user", "metadata", "stream", "store", "n", "tools", "logit_bias", "stream_options")
    assert read(endpoint, **dict.fromkeys(names)).job == read(endpoint).job


@pytest.mark.parametrize("endpoint", READ)
def test_vllms_names_of_structured_output_are_known(endpoint: str) -> None:
    assert read(endpoint, guided_regex="a+").job.params.regex == "a+"
    assert read(endpoint, structured_outputs={"choice": ["a", "b"]}).job.params.choice.options == ["a", "b"]
    assert read(endpoint, guided_json=SCHEMA).job.params.json_schema.startswith('{"type":"object"')
    assert refused(endpoint, guided_regex="a+", guided_choice=["a"]) == "guided_choice"
    assert refused(endpoint, structured_outputs={"grammar": "a"}) == "structured_outputs.grammar"


def test_a_user_that_has_not_the_form_of_a_user_id_is_hashed() -> None:
    assert read("chat", user="alice@example.com").job.user_id == "alice@example.com"
    assert read("chat", safety_identifier="bob").job.user_id == "bob"
    hashed = read("chat", user="Bob Smith").job.user_id
    assert hashed.startswith("sha256-")
    assert hashed != read("chat", user="Bob  Smith").job.user_id


@pytest.mark.parametrize(
    ("endpoint", "parameters", "param"),
    [
        ("responses", {"tools": [{"type": "web_search"}]}, "tools"),
        ("responses", {"tool_choice": "required"}, "tool_choice"),
        ("responses", {"previous_response_id": "resp_1"}, "previous_response_id"),
        ("responses", {"conversation": "conv_1"}, "conversation"),
        ("responses", {"reasoning": {"effort": "low"}}, "reasoning"),
        ("responses", {"truncation": "auto"}, "truncation"),
        ("responses", {"include": ["reasoning.encrypted_content"]}, "include[0]"),
        ("responses", {"max_tool_calls": 1}, "max_tool_calls"),
        ("responses", {"prompt": {"id": "pmpt_1"}}, "prompt"),
        ("responses", {"text": {"verbosity": "low"}}, "text.verbosity"),
        ("responses", {"text": {"format": {"type": "grammar"}}}, "text.format.type"),
        ("responses", {"text": {"format": {"type": "json_schema", "schema": {}}}}, "text.format.name"),
        ("responses", {"input": [{"type": "function_call_output", "call_id": "1", "output": "2"}]}, "input[0].type"),
        ("responses", {"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "input[0].content[0].type"),
        ("responses", {"input": None}, "input"),
        ("responses", {"store": False, "background": True}, "store"),
        ("responses", {"stream": "yes"}, "stream"),
        ("responses", {"service_tier": "fast"}, "service_tier"),
        ("responses", {"stream_options": {"include_obfuscation": True}}, "stream_options.include_obfuscation"),
        ("chat", {"n": 2}, "n"),
        ("chat", {"logit_bias": {"1": 2}}, "logit_bias"),
        ("chat", {"tools": [{"type": "function"}]}, "tools"),
        ("chat", {"top_logprobs": 2}, "top_logprobs"),
        ("chat", {"stream_options": {"include_usage": True}}, "stream_options"),
        ("chat", {"max_tokens": 1, "max_completion_tokens": 2}, "max_tokens"),
        ("chat", {"messages": [{"role": "tool", "content": "1"}]}, "messages[0].role"),
        ("chat", {"messages": [{"role": "user", "content": "1", "name": "bob"}]}, "messages[0].name"),
        ("chat", {"messages": [{"role": "user", "content": "\ud800"}]}, "messages[0].content"),
        ("chat", {"messages": "Hi"}, "messages"),
        ("chat", {"modalities": ["text", "audio"]}, "modalities"),
        ("chat", {"temperature": "0.1"}, "temperature"),
        ("chat", {"temperature": True}, "temperature"),
        ("chat", {"seed": 2**63}, "seed"),
        ("chat", {"max_tokens": 1.5}, "max_tokens"),
        ("chat", {"metadata": {"a": 1}}, "metadata.a"),
        ("chat", {"metadata": {str(index): "" for index in range(16)}}, "metadata"),
        ("chat", {"metadata": {"openai.request": "{}"}}, "metadata.openai.request"),
        ("chat", {"web_search_options": {}}, "web_search_options"),
        ("completions", {"echo": True}, "echo"),
        ("completions", {"best_of": 2}, "best_of"),
        ("completions", {"suffix": "x"}, "suffix"),
        ("completions", {"prompt": [1, 2]}, "prompt"),
        ("completions", {"prompt": ["a", "b"]}, "prompt"),
        ("completions", {"model": None}, "model"),
        ("completions", {"surprise": 0}, "surprise"),
    ],
)
def test_what_is_not_supported_is_refused(endpoint: str, parameters: dict[str, Any], param: str) -> None:
    assert refused(endpoint, **parameters) == param


@pytest.mark.parametrize(
    ("endpoint", "field", "param"),
    [
        ("responses", "job.params.stop[2]", "stop[2]"),
        ("responses", "job.messages[0].content", "instructions"),
        ("responses", "job.messages[2].content", "input[1].content"),
        ("responses", 'job.labels["a"]', 'metadata["a"]'),
        ("chat", "job.messages[0].content", "messages[0].content"),
        ("chat", "job.job_class", "service_tier"),
        ("chat", "job", "messages"),
        ("responses", "job", "input"),
        ("responses", "", "input"),
        ("responses", "job.messages", "input"),
        ("completions", "job", "prompt"),
        ("completions", "job.params.logprobs", "logprobs"),
        ("completions", "job.model", "model"),
    ],
)
def test_what_the_gateway_refuses_has_the_clients_name(endpoint: str, field: str, param: str) -> None:
    messages = [{"role": "user", "content": "a"}, {"role": "user", "content": "b"}]
    more = {"responses": {"instructions": "x", "input": messages}, "chat": {"messages": messages}, "completions": {}}
    asked = read(endpoint, **more[endpoint])
    assert asked.violation(Violation(field, "is wrong")).field == param


@pytest.mark.parametrize(
    ("endpoint", "parameters", "field", "param"),
    [
        ("responses", {"guided_json": SCHEMA}, "job.params.json_schema", "guided_json"),
        ("chat", {"structured_outputs": {"json": SCHEMA}}, "job.params.json_schema", "structured_outputs.json"),
        ("chat", {"structured_outputs": {"regex": "a"}}, "job.params.regex", "structured_outputs.regex"),
        ("completions", {"guided_choice": ["a"]}, "job.params.choice.options[0]", "guided_choice[0]"),
        ("responses", {"text": {"format": {"type": "json_object"}}}, "job.params.json_schema", "text.format.type"),
        ("chat", {"response_format": {"type": "json_object"}}, "job.params.json_schema", "response_format.type"),
        ("chat", {"max_tokens": 1}, "job.params.max_tokens", "max_tokens"),
        ("chat", {"max_completion_tokens": 1}, "job.params.max_tokens", "max_completion_tokens"),
        ("chat", {"logprobs": True}, "job.params.logprobs", "logprobs"),
        ("chat", {"logprobs": True, "top_logprobs": 30}, "job.params.logprobs", "top_logprobs"),
        ("responses", {"include": ["message.output_text.logprobs"]}, "job.params.logprobs", "include"),
        ("responses", {"top_logprobs": 3}, "job.params.logprobs", "top_logprobs"),
        ("responses", {"safety_identifier": "a"}, "job.user_id", "safety_identifier"),
        ("responses", {"user": "a"}, "job.user_id", "user"),
    ],
)
def test_a_field_has_the_name_of_the_parameter_that_was_sent(
    endpoint: str, parameters: dict[str, Any], field: str, param: str
) -> None:
    assert read(endpoint, **parameters).violation(Violation(field, "is wrong")).field == param


@pytest.mark.parametrize(
    ("endpoint", "parameter", "value"),
    [
        ("responses", "input", []),
        ("chat", "messages", []),
        ("completions", "prompt", ""),
        ("completions", "prompt", [""]),
    ],
)
def test_an_empty_request_names_what_is_empty(endpoint: str, parameter: str, value: Any) -> None:
    assert refused(endpoint, **{parameter: value}) == parameter


@pytest.mark.parametrize(
    ("tier", "job_class", "answered"),
    [
        (None, common_pb2.JOB_CLASS_UNSPECIFIED, "default"),
        ("auto", common_pb2.JOB_CLASS_UNSPECIFIED, "default"),
        ("default", common_pb2.JOB_CLASS_UNSPECIFIED, "default"),
        ("priority", common_pb2.JOB_CLASS_HIGH, "priority"),
        ("flex", common_pb2.JOB_CLASS_BACKGROUND, "flex"),
    ],
)
def test_a_service_tier_is_a_class(tier: str | None, job_class: int, answered: str) -> None:
    job = read("responses", **({} if tier is None else {"service_tier": tier})).job
    assert (job.job_class, job.priority) == (job_class, 0)
    assert tier_of(job) == answered


def test_the_rules_of_the_gateway_speak_of_the_clients_parameters() -> None:
    """A client that set max_output_tokens has set no max_tokens."""
    asked = read("responses", min_tokens=5, max_output_tokens=2)
    least = asked.violation(Violation("job.params.min_tokens", "must be at most max_tokens"))
    assert least == Violation("min_tokens", "must be at most max_output_tokens")


@pytest.mark.parametrize("endpoint", PATHS)
def test_the_parameters_that_are_taken_are_described(endpoint: str) -> None:
    """Of one that is not taken nothing more is said than that."""
    described = PARAMETERS[PATHS[endpoint]]
    for name in described:
        wrong: list[Violation] = []
        try:
            read(endpoint, **{name: [[{"no": "value"}]]})
        except InvalidBody as failure:
            wrong = list(failure.violations)
        assert Violation(name, "is not supported") not in wrong
    page = (ROOT / "docs" / "openai.md").read_text()
    table = page[page.index("| parameter | of |") :].split("\n\n")[0]
    known = {name for of_path in PARAMETERS.values() for name in of_path}
    documented = {
        name.partition(".")[0].partition("=")[0]
        for row in table.splitlines()[2:]
        for name in re.findall(r"`([^`]+)`", row.split("|")[1])
    }
    assert documented - known == set()


def test_a_target_of_the_outcome_is_taken_as_it_is() -> None:
    target = {"webhook": {"url": "https://a.example/", "format": "WEBHOOK_FORMAT_OPENAI"}}
    job = read("responses", durable_llm={"notify": [target]}).job
    assert job.notify[0].webhook.format == llm_pb2.WEBHOOK_FORMAT_OPENAI
    assert job.messages[0].content == "Hi"
    asked = read("chat", durable_llm={"notify": [target]})
    assert (
        asked.violation(Violation("job.notify[0].webhook.url", "is wrong")).field == "durable_llm.notify[0].webhook.url"
    )
    assert refused("chat", durable_llm={"notify": [{"webhook": {"uri": "x"}}]}) == "durable_llm.notify[0].webhook.uri"
    assert refused("chat", durable_llm={"notify": {}}) == "durable_llm.notify"
    assert refused("chat", durable_llm={"priority": 1}) == "durable_llm.priority"
