"""Checks answers against the description at /openapi.json."""

import importlib.util
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import httpx
import pytest


async def description_of(base: str) -> "Description | None":
    """Return the description of a front's API; None where the packages that check answers are not installed."""
    if importlib.util.find_spec("openapi_spec_validator") is None:
        return None
    async with httpx.AsyncClient(trust_env=False) as client:
        return Description((await client.get(f"{base}/openapi.json")).json())


@asynccontextmanager
async def checked_client(base: str, described: "Description | None") -> AsyncIterator[httpx.AsyncClient]:
    """Yield a client of a front that checks every answer against the description."""
    hooks = [described.check] if described is not None else []
    async with httpx.AsyncClient(
        base_url=base, timeout=60, trust_env=False, event_hooks={"response": [*hooks]}
    ) as client:
        yield client


class Description:
    """The description of an API. An answer may hold nothing that is not described."""

    def __init__(self, described: dict[str, Any]) -> None:
        # Not every environment of the tests has it.
        self._jsonschema = pytest.importorskip("jsonschema")
        self.described = described
        self._components = _closed(described["components"])

    async def check(self, answer: httpx.Response) -> None:
        """Assert that an answer is one of those of its operation. It is a hook of httpx."""
        path = answer.request.url.raw_path.decode().partition("?")[0]
        method = "get" if answer.request.method == "HEAD" else answer.request.method.lower()
        operations = next((found for found in self._operations(path) if found), {})
        responses = operations.get(method, {}).get("responses", {"default": _default(self.described, path)})
        content = responses.get(str(answer.status_code), responses["default"]).get("content", {})
        kind = answer.headers.get("content-type", "").partition(";")[0]
        if not content:
            assert not await answer.aread()
            return
        assert kind in content, (path, answer.status_code, kind)
        if kind.endswith("json") and answer.request.method != "HEAD":
            await answer.aread()
            self._validate(content[kind]["schema"], answer.json())

    def check_message(self, name: str, value: Any) -> None:
        """Assert that a value is a message that the description names."""
        self._validate({"$ref": f"#/components/schemas/{name}"}, value)

    def _operations(self, path: str) -> Any:
        for template, operations in self.described["paths"].items():
            if re.fullmatch(re.sub(r"{\w+}", ".+", template), path):
                yield operations

    def _validate(self, schema: dict[str, Any], value: Any) -> None:
        self._jsonschema.Draft202012Validator({**_closed(schema), "components": self._components}).validate(value)


def _default(described: dict[str, Any], near: str) -> Any:
    """Return the error that every operation near a path has, for paths that do not exist."""
    prefix = "/v1/"
    (default,) = {
        str(operation["responses"]["default"]): operation["responses"]["default"]
        for path, operations in described["paths"].items()
        if path.startswith(prefix) == near.startswith(prefix)
        for operation in operations.values()
    }.values()
    return default


def _closed(schema: Any) -> Any:
    """Return a schema whose objects have no other properties than those that it names."""
    if isinstance(schema, list):
        return [_closed(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    closed = {key: _closed(value) for key, value in schema.items()}
    if isinstance(schema.get("properties"), dict) and schema.get("type") == "object":
        closed.setdefault("additionalProperties", False)
    return closed
