"""The requests of `POST /v1/chat/completions` and of `POST /v1/completions`."""

from llm_pb import llm_pb2
from openai_api.asked import Asked, take_common
from openai_api.errors import invalid, unsupported
from openai_api.messages import message_of
from openai_api.parameters import Parameters, list_of, required
from openai_api.sampling import take_format, take_max_tokens, take_sampling


def read_chat_request(body: object) -> Asked:
    """Return what the body of a chat completion asks for. Raises InvalidBody for whatever is not supported."""
    parameters, job = Parameters(body), llm_pb2.JobRequest()
    take_common(parameters, job)
    paths = []
    for index, item in enumerate(list_of(required(parameters.any("messages"), "messages"), "messages")):
        paths.append(f"messages[{index}]")
        job.messages.append(message_of(item, paths[-1], ("text",)))
    if not job.messages:
        raise invalid("messages", "must not be empty")
    take_sampling(parameters, job.params)
    take_max_tokens(parameters, job.params, "max_completion_tokens", "max_tokens")
    take_format(parameters.members("response_format"), job.params, "json_schema")
    logprobs, most = parameters.boolean("logprobs"), parameters.integer("top_logprobs")
    if most and not logprobs:
        raise invalid("top_logprobs", "needs logprobs to be true")
    if logprobs:
        job.params.logprobs = most or 0
        parameters.names["logprobs"] = "logprobs" if most is None else "top_logprobs"
    asked = Asked(job, parameters.names, paths)
    _take_answer(parameters, asked)
    parameters.allow("tools", [])
    parameters.allow("functions", [])
    parameters.allow("tool_choice", "auto", "none")
    parameters.allow("function_call", "auto", "none")
    parameters.allow("parallel_tool_calls", True, False)
    parameters.allow("modalities", ["text"])
    parameters.allow("verbosity", "medium")
    parameters.require_all_taken()
    return asked


def read_completion_request(body: object) -> Asked:
    """Return what the body of a completion asks for. Raises InvalidBody for whatever is not supported."""
    parameters, job = Parameters(body), llm_pb2.JobRequest()
    take_common(parameters, job)
    prompts = required(parameters.any("prompt"), "prompt")
    if isinstance(prompts, list) and len(prompts) == 1:
        prompts = prompts[0]
    if not isinstance(prompts, str):
        raise unsupported("prompt", "it may only be one text")
    job.prompt = required(Parameters({"prompt": prompts}).text("prompt"), "prompt")
    if not job.prompt:
        raise invalid("prompt", "must not be empty")
    take_sampling(parameters, job.params)
    take_max_tokens(parameters, job.params, "max_tokens")
    if (logprobs := parameters.integer("logprobs")) is not None:
        job.params.logprobs = logprobs
    asked = Asked(job, parameters.names)
    _take_answer(parameters, asked)
    parameters.allow("echo", False)
    parameters.allow("best_of", 1)
    parameters.allow("suffix", "")
    parameters.require_all_taken()
    return asked


def _take_answer(parameters: Parameters, asked: Asked) -> None:
    """Take what says how the answer comes."""
    parameters.allow("n", 1)
    parameters.allow("logit_bias", {})
    asked.store = parameters.boolean("store", otherwise=True)
    asked.stream = parameters.boolean("stream")
    if (options := parameters.members("stream_options")) is not None:
        if not asked.stream:
            raise invalid("stream_options", "needs stream to be true")
        asked.include_usage = options.boolean("include_usage")
        options.allow("include_obfuscation", False)
        options.require_all_taken()
