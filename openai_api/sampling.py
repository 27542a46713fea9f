"""How tokens are chosen: the parameters that OpenAI's endpoints share, and those that vLLM adds to them."""

import json
from typing import Any, Final

from llm_pb import llm_pb2
from openai_api.errors import invalid, unsupported
from openai_api.parameters import Parameters, required

JSON_OBJECT: Final = '{"type":"object"}'
"""The JSON Schema that stands for the format `json_object`."""
MAX_TOP_LOGPROBS: Final = 20


def take_sampling(parameters: Parameters, params: llm_pb2.SamplingParams) -> None:
    """Fill in what OpenAI's endpoints call by the same names. The gateway checks the numbers. Raises InvalidBody."""
    for name in ("temperature", "top_p", "presence_penalty", "frequency_penalty", "min_p", "repetition_penalty"):
        if (number := parameters.number(name)) is not None:
            setattr(params, name, number)
    for name in ("top_k", "min_tokens"):
        if (integer := parameters.integer(name)) is not None:
            # vLLM switches it off by -1.
            setattr(params, name, 0 if (name, integer) == ("top_k", -1) else integer)
    if (seed := parameters.long("seed")) is not None:
        params.seed = seed
    params.stop.extend(parameters.texts("stop") or ())
    _take_structured_output(parameters, params)


def take_max_tokens(parameters: Parameters, params: llm_pb2.SamplingParams, *names: str) -> None:
    """Fill in the maximum number of output tokens, which has one of these names. Raises InvalidBody for two of them."""
    for name in names:
        most = parameters.integer(name)
        if most is None:
            continue
        if params.HasField("max_tokens") and params.max_tokens != most:
            raise invalid(name, f"must not differ from {names[0]!r}")
        params.max_tokens = most
        parameters.names["max_tokens"] = name


def take_format(format_: Parameters | None, params: llm_pb2.SamplingParams, schema_of: str = "") -> str:
    """Fill in a `response_format`, or a `text.format`, and return the name of its schema; empty without one.

    `schema_of` is the member that holds name and schema; empty where the format holds them itself. Raises InvalidBody.
    """
    if format_ is None:
        return ""
    name = ""
    match kind := format_.text("type"):
        case "text":
            pass
        case "json_object":
            _set_structured_output(params, "json_schema", JSON_OBJECT, format_, "type")
        case "json_schema":
            holder = format_
            if schema_of:
                holder = required(format_.members(schema_of), format_.path(schema_of))
            name = required(holder.text("name"), holder.path("name"))
            schema = holder.any("schema")
            if not isinstance(schema, dict):
                raise invalid(holder.path("schema"), "must be a JSON Schema")
            # The output always follows the schema, which is what `strict` asks for.
            holder.boolean("strict")
            holder.text("description")
            holder.require_all_taken()
            _set_structured_output(params, "json_schema", _json(schema), holder, "schema")
        case _:
            raise unsupported(format_.path("type"), f"it is {kind!r}")
    format_.require_all_taken()
    return name


def _take_structured_output(parameters: Parameters, params: llm_pb2.SamplingParams) -> None:
    """Take vLLM's names of structured output."""
    holders = [(parameters, "guided_")]
    if (structured := parameters.members("structured_outputs")) is not None:
        holders.append((structured, ""))
    for holder, prefix in holders:
        if (schema := holder.any(name := f"{prefix}json")) is not None:
            text = schema if isinstance(schema, str) else _json(schema)
            _set_structured_output(params, "json_schema", text, holder, name)
        if (regex := holder.text(name := f"{prefix}regex")) is not None:
            _set_structured_output(params, "regex", regex, holder, name)
        if (choices := holder.texts(name := f"{prefix}choice")) is not None:
            _set_structured_output(params, "choice", llm_pb2.Choice(options=choices), holder, name)
    if structured is not None:
        structured.require_all_taken()


def _set_structured_output(
    params: llm_pb2.SamplingParams, field: str, value: Any, holder: Parameters, name: str
) -> None:
    path = holder.path(name)
    holder.names[field] = path
    if params.WhichOneof("structured_output") is not None:
        raise invalid(path, "must not constrain the output a second time")
    if isinstance(value, llm_pb2.Choice):
        params.choice.CopyFrom(value)
        return
    try:
        setattr(params, field, value)
    except (TypeError, ValueError):
        raise invalid(path, "must be a JSON Schema" if field == "json_schema" else "must be a string") from None


def _json(value: object) -> str:
    """Return compact JSON. It keeps the order of the members, which is the order in which the model writes them."""
    return json.dumps(value, separators=(",", ":"))
