"""The description of the API, in OpenAPI 3.1: that of REST is made of its operations and of llm.proto's messages."""

import re
from collections.abc import Mapping
from typing import Any, Final

from services.http.resources import Resource
from services.http.rest.operations import Operation, Paths
from services.http.rest.schemas import Schemas

VERSION: Final = "1"
_NAMES: Final = re.compile(r"{(\w+):id}")
"""A parameter in the template of a path."""
_OF_PATH: Final = {
    "id": "The id. A `/` in it may be sent as it is, or as %2F.",
    "alias": "The alias.",
    "version": "The number of the version.",
}
_PROBLEM: Final = {
    "type": "object",
    "description": "What is wrong, as RFC 9457 defines it.",
    "required": ["title", "status", "detail"],
    "properties": {
        "title": {"type": "string", "description": "The name of the HTTP status."},
        "status": {"type": "integer", "description": "The HTTP status."},
        "detail": {"type": "string", "description": "What is wrong, for people."},
        "reason": {"type": "string", "description": "What is wrong, for programs: see docs/errors.md."},
        "errors": {
            "type": "array",
            "description": "Every bad field.",
            "items": {
                "type": "object",
                "required": ["field", "message"],
                "properties": {"field": {"type": "string"}, "message": {"type": "string"}},
            },
        },
    },
}
_ERROR: Final = {
    "description": "The request was refused, or it failed.",
    "content": {"application/problem+json": {"schema": {"$ref": "#/components/schemas/Problem"}}},
}


def describe(paths: Paths, further: Mapping[str, Any]) -> dict[str, Any]:
    """Return the description of the operations, and of `further` ones, which are described already."""
    schemas = Schemas()
    described = {
        Resource(path, operations).template: {
            method.lower(): _operation(path, operation, schemas) for method, operation in operations.items()
        }
        for path, operations in paths.items()
    }
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "Durable LLM jobs",
            "version": VERSION,
            "description": "Jobs that survive the loss of any process. llm.proto says what each field means.",
        },
        "paths": {**described, **further},
        "components": {
            "schemas": {**schemas.named, "Problem": _PROBLEM},
            "securitySchemes": {"bearer": {"type": "http", "scheme": "bearer"}},
        },
        # Where the operator asks for no credential none is needed.
        "security": [{"bearer": []}, {}],
    }


def _operation(path: str, operation: Operation, schemas: Schemas) -> dict[str, Any]:
    described: dict[str, Any] = {
        "operationId": operation.name,
        "summary": operation.summary,
        "responses": {str(int(operation.status)): _answer(operation, schemas), "default": _ERROR},
    }
    parameters: list[dict[str, Any]] = [
        {"name": name, "in": "query", "description": parameter.description, "schema": dict(parameter.schema)}
        for name, parameter in operation.query.items()
    ]
    of_path: list[dict[str, Any]] = [
        {"name": name, "in": "path", "required": True, "description": _OF_PATH[name], "schema": {"type": "string"}}
        for name in _NAMES.findall(path)
    ]
    parameters = [*of_path, *parameters]
    if operation.ends:
        described["responses"]["204"] = {"description": operation.ends}
    if parameters:
        described["parameters"] = parameters
    if operation.body is not None:
        schema = schemas.of(operation.body.DESCRIPTOR, operation.body_without)
        content = {"application/json": {"schema": schema}}
        described["requestBody"] = {
            "required": operation.body_required or not operation.body_without,
            "content": content,
        }
    return described


def _answer(operation: Operation, schemas: Schemas) -> dict[str, Any]:
    if operation.answer is None:
        schema: dict[str, Any] = {"type": "object"}
    else:
        schema = schemas.of(operation.answer.DESCRIPTOR)
    if operation.media_type != "application/json":
        # A text, whose events hold the message.
        schema = {"type": "string"}
    return {"description": operation.summary, "content": {operation.media_type: {"schema": schema}}}
