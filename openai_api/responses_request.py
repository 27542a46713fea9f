"""The request of `POST /v1/responses`."""

from typing import Final

from llm_pb import llm_pb2
from openai_api.asked import Asked, take_common
from openai_api.errors import invalid, unsupported
from openai_api.messages import message_of
from openai_api.parameters import Parameters, list_of, required, text_of
from openai_api.sampling import take_format, take_max_tokens, take_sampling

LOGPROBS: Final = "message.output_text.logprobs"
"""The member of `include` that asks for log probabilities."""
_KINDS: Final = ("input_text", "output_text", "text")


def read_responses_request(body: object) -> Asked:
    """Return what the body asks for. Raises InvalidBody for whatever is not supported."""
    parameters, job = Parameters(body), llm_pb2.JobRequest()
    take_common(parameters, job)
    instructions = parameters.text("instructions") or ""
    paths = []
    if instructions:
        job.messages.add(role=llm_pb2.ROLE_SYSTEM, content=instructions)
        paths.append("instructions")
    given = required(parameters.any("input"), "input")
    if isinstance(given, str):
        job.messages.add(role=llm_pb2.ROLE_USER, content=text_of(given, "input"))
        paths.append("input")
    else:
        for index, item in enumerate(list_of(given, "input")):
            paths.append(f"input[{index}]")
            job.messages.append(message_of(item, paths[-1], _KINDS))
    if not job.messages:
        raise invalid("input", "must not be empty")
    parameters.names["messages"] = "input"
    take_sampling(parameters, job.params)
    take_max_tokens(parameters, job.params, "max_output_tokens")
    format_name = ""
    if (text := parameters.members("text")) is not None:
        text.allow("verbosity", "medium")
        format_name = take_format(text.members("format"), job.params)
        text.require_all_taken()
    _take_logprobs(parameters, job.params)
    asked = Asked(
        job,
        parameters.names,
        paths,
        stream=parameters.boolean("stream"),
        background=parameters.boolean("background"),
        instructions=bool(instructions),
        format_name=format_name,
        store=parameters.boolean("store", otherwise=True),
    )
    if asked.background and not asked.store:
        raise unsupported("store", "an answer that is made in the background is stored until it has been read")
    _allow_defaults(parameters)
    parameters.require_all_taken()
    return asked


def _take_logprobs(parameters: Parameters, params: llm_pb2.SamplingParams) -> None:
    included = parameters.texts("include") or []
    for index, name in enumerate(included):
        if name != LOGPROBS:
            raise unsupported(f"include[{index}]", f"it is {name!r}")
    most = parameters.integer("top_logprobs")
    if included or most:
        params.logprobs = most or 0
        parameters.names["logprobs"] = "include" if most is None else "top_logprobs"


def _allow_defaults(parameters: Parameters) -> None:
    """Accept the parameters that have no effect here, with the values that clients send anyway."""
    if (options := parameters.members("stream_options")) is not None:
        options.allow("include_obfuscation", False)
        options.require_all_taken()
    parameters.allow("tools", [])
    parameters.allow("tool_choice", "auto", "none")
    parameters.allow("parallel_tool_calls", True, False)
    parameters.allow("truncation", "disabled")
