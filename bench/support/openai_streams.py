"""Streams of OpenAI's API, read without its client: that client's own cost would be in the figures."""

import json
from collections.abc import AsyncIterator
from typing import Any

import aiohttp


async def completion(
    session: aiohttp.ClientSession, url: str, model: str, prompt: str, tokens: int
) -> AsyncIterator[str]:
    """Yield the texts of a completion as they arrive. `url` is that of the server, without /v1."""
    body = {"model": model, "prompt": prompt, "max_tokens": tokens, "stream": True}
    async for event in _events(session, f"{url}/v1/completions", body):
        for choice in event["choices"]:
            yield choice["text"]


async def response(
    session: aiohttp.ClientSession, url: str, model: str, prompt: str, tokens: int
) -> AsyncIterator[str]:
    """Yield the texts of a response in the background as they arrive."""
    body = {"model": model, "input": prompt, "max_output_tokens": tokens, "stream": True, "background": True}
    async for event in _events(session, f"{url}/v1/responses", body):
        if event["type"] == "response.output_text.delta":
            yield event["delta"]


async def _events(session: aiohttp.ClientSession, url: str, body: dict[str, Any]) -> AsyncIterator[dict[str, Any]]:
    async with session.post(url, json=body) as answer:
        answer.raise_for_status()
        async for line in answer.content:
            if line.startswith(b"data: {"):
                yield json.loads(line[6:])
