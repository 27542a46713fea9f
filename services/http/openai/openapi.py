"""The description of OpenAI's API in /openapi.json: its paths, and the parameters that are taken.

Answers are described loosely: OpenAI's own description and clients have their types.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Final

from openai_api.asked import CLASS_OF_TIER
from services.http.resources import Resource

_Schema = dict[str, Any]
_TEXT: Final[_Schema] = {"type": "string"}
_FLAG: Final[_Schema] = {"type": "boolean"}
_NUMBER: Final[_Schema] = {"type": "number"}
_INTEGER: Final[_Schema] = {"type": "integer"}
_OBJECT: Final[_Schema] = {"type": "object"}
_ANY: Final[_Schema] = {}
_TEXTS: Final[_Schema] = {"type": ["string", "array"], "items": _TEXT}
_LIST: Final[_Schema] = {"type": "array"}

_SHARED: Final = {
    "model": _TEXT,
    "user": _TEXT,
    "safety_identifier": _TEXT,
    "prompt_cache_key": _TEXT,
    "prompt_cache_retention": {"type": "string", "enum": ["in_memory", "24h"]},
    "metadata": {"type": "object", "additionalProperties": _TEXT},
    "service_tier": {"type": "string", "enum": ["auto", "default", *CLASS_OF_TIER]},
    "durable_llm": {
        "type": "object",
        "description": "What OpenAI's API does not have.",
        "properties": {"notify": {"type": "array", "items": {"$ref": "#/components/schemas/NotifyTarget"}}},
    },
    "temperature": _NUMBER,
    "top_p": _NUMBER,
    "presence_penalty": _NUMBER,
    "frequency_penalty": _NUMBER,
    "min_p": _NUMBER,
    "repetition_penalty": _NUMBER,
    "top_k": _INTEGER,
    "min_tokens": _INTEGER,
    "seed": _INTEGER,
    "stop": _TEXTS,
    "guided_json": _ANY,
    "guided_regex": _TEXT,
    "guided_choice": _TEXTS,
    "structured_outputs": _OBJECT,
    "store": _FLAG,
    "stream": _FLAG,
    "stream_options": _OBJECT,
}
_OF_COMPLETIONS: Final = {"n": _INTEGER, "logit_bias": _OBJECT, "max_tokens": _INTEGER}

PARAMETERS: Final[Mapping[str, Mapping[str, _Schema]]] = {
    "/v1/responses": _SHARED
    | {
        "input": {"type": ["string", "array"]},
        "instructions": _TEXT,
        "max_output_tokens": _INTEGER,
        "text": _OBJECT,
        "include": _TEXTS,
        "top_logprobs": _INTEGER,
        "background": _FLAG,
        "tools": _LIST,
        "tool_choice": _TEXT,
        "parallel_tool_calls": _FLAG,
        "truncation": _TEXT,
    },
    "/v1/chat/completions": _SHARED
    | _OF_COMPLETIONS
    | {
        "messages": _LIST,
        "max_completion_tokens": _INTEGER,
        "response_format": _OBJECT,
        "logprobs": _FLAG,
        "top_logprobs": _INTEGER,
        "tools": _LIST,
        "functions": _LIST,
        "tool_choice": _TEXT,
        "function_call": _TEXT,
        "parallel_tool_calls": _FLAG,
        "modalities": _LIST,
        "verbosity": _TEXT,
    },
    "/v1/completions": _SHARED
    | _OF_COMPLETIONS
    | {"prompt": _TEXTS, "logprobs": _INTEGER, "echo": _FLAG, "best_of": _INTEGER, "suffix": _TEXT},
    "/v1/batches": {
        "input_file_id": _TEXT,
        "endpoint": {"type": "string", "enum": ["/v1/chat/completions", "/v1/responses", "/v1/completions"]},
        "completion_window": {"type": "string", "pattern": "^[1-9][0-9]*[mhd]$"},
        "metadata": {"type": "object", "additionalProperties": _TEXT},
    },
}
"""The accepted parameters of the bodies. docs/openai.md says which of them take a single value."""
_REQUIRED: Final = {
    "/v1/responses": ["model", "input"],
    "/v1/chat/completions": ["model", "messages"],
    "/v1/completions": ["model", "prompt"],
    "/v1/batches": ["input_file_id", "endpoint", "completion_window"],
}
_QUERIES: Final[Mapping[str, Mapping[str, _Schema]]] = {
    "/v1/responses/{id}": {"stream": _FLAG, "starting_after": _INTEGER, "include": _LIST, "include_obfuscation": _FLAG},
    "/v1/responses/{id}/input_items": {"after": _TEXT, "limit": _INTEGER, "order": _TEXT, "include": _LIST},
    "/v1/files": {"after": _TEXT, "limit": _INTEGER, "order": _TEXT, "purpose": _TEXT},
    "/v1/batches": {"after": _TEXT, "limit": _INTEGER},
}
_SUMMARIES: Final = {
    ("/v1/responses", "POST"): ("createResponse", "Creates a response, in the background or not, streamed or not."),
    ("/v1/responses/{id}", "GET"): ("getResponse", "Returns a response, or with stream=true its events."),
    ("/v1/responses/{id}", "DELETE"): ("deleteResponse", "Deletes a response with its job."),
    ("/v1/responses/{id}/cancel", "POST"): ("cancelResponse", "Cancels a response in the background."),
    ("/v1/responses/{id}/input_items", "GET"): ("listInputItems", "Lists the input of a response."),
    ("/v1/chat/completions", "POST"): ("createChatCompletion", "Creates a chat completion, streamed or not."),
    ("/v1/completions", "POST"): ("createCompletion", "Creates a completion, streamed or not."),
    ("/v1/files", "POST"): ("createFile", "Uploads a file."),
    ("/v1/files", "GET"): ("listFiles", "Lists files, the newest first."),
    ("/v1/files/{id}", "GET"): ("getFile", "Returns a file without its content."),
    ("/v1/files/{id}", "DELETE"): ("deleteFile", "Deletes a file."),
    ("/v1/files/{id}/content", "GET"): ("getFileContent", "Returns the content of a file."),
    ("/v1/batches", "POST"): ("createBatch", "Creates a batch of the lines of a file."),
    ("/v1/batches", "GET"): ("listBatches", "Lists batches, open ones first."),
    ("/v1/batches/{id}", "GET"): ("getBatch", "Returns a batch."),
    ("/v1/batches/{id}/cancel", "POST"): ("cancelBatch", "Cancels a batch."),
    ("/v1/models", "GET"): ("listOpenAiModels", "Lists the models."),
    ("/v1/models/{id}", "GET"): ("getOpenAiModel", "Returns a model."),
}
_FORMS: Final[Mapping[str, _Schema]] = {
    "/v1/files": {
        "type": "object",
        "required": ["purpose", "file"],
        "properties": {
            "purpose": _TEXT,
            "user": _TEXT,
            "expires_after[anchor]": {"type": "string", "enum": ["created_at"]},
            "expires_after[seconds]": _INTEGER,
            "file": {"type": "string", "contentMediaType": "application/octet-stream", "description": "The last part."},
        },
        "additionalProperties": False,
    }
}
"""The accepted forms."""
_STREAMED: Final = {"/v1/responses", "/v1/chat/completions", "/v1/completions"}
_ERROR: Final[_Schema] = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": _TEXT,
                "type": _TEXT,
                "param": {"type": ["string", "null"], "description": "The first bad parameter, as it was sent."},
                "code": {"type": ["string", "null"]},
            },
        }
    },
}


def describe(resources: Sequence[Resource]) -> dict[str, Any]:
    """Return the operations of the resources by path and by method in lower case, as OpenAPI has them."""
    return {
        resource.template: {method.lower(): _operation(resource.template, method) for method in resource.methods}
        for resource in resources
    }


def _operation(path: str, method: str) -> dict[str, Any]:
    name, summary = _SUMMARIES[path, method]
    answer: dict[str, Any] = {"application/json": {"schema": _OBJECT}}
    if path.endswith("/content"):
        answer = {"application/octet-stream": {}}
    if path in _STREAMED or (path, method) == ("/v1/responses/{id}", "GET"):
        answer["text/event-stream"] = {"schema": _TEXT}
    error = {
        "description": "The request was refused, or it failed.",
        "content": {"application/json": {"schema": _ERROR}},
    }
    described: dict[str, Any] = {
        "operationId": name,
        "summary": summary,
        "responses": {"200": {"description": summary, "content": answer}, "default": error},
    }
    parameters = [{"name": "id", "in": "path", "required": True, "schema": _TEXT} for _ in range("{id}" in path)]
    if method == "GET":
        parameters += [{"name": key, "in": "query", "schema": schema} for key, schema in _QUERIES.get(path, {}).items()]
    if method == "POST" and path in PARAMETERS:
        parameters.append({"name": "Idempotency-Key", "in": "header", "schema": _TEXT})
        schema = {
            "type": "object",
            "required": _REQUIRED[path],
            "properties": PARAMETERS[path],
            "additionalProperties": False,
        }
        described["requestBody"] = {"required": True, "content": {"application/json": {"schema": schema}}}
    if method == "POST" and path in _FORMS:
        parameters.append({"name": "Idempotency-Key", "in": "header", "schema": _TEXT})
        described["requestBody"] = {"required": True, "content": {"multipart/form-data": {"schema": _FORMS[path]}}}
    if parameters:
        described["parameters"] = parameters
    return described
