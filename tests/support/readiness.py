"""Asks services whether they live and are ready."""

import json
from typing import Any, NamedTuple

import aiohttp

from deploy.local.stack import Stack


class Answer(NamedTuple):
    status: int
    body: Any


async def get(url: str, method: str = "GET") -> Answer:
    timeout = aiohttp.ClientTimeout(total=30)
    async with aiohttp.ClientSession(timeout=timeout) as session, session.request(method, url) as response:
        text = await response.text()
        is_json = response.content_type == "application/json"
        return Answer(response.status, json.loads(text) if is_json and text else text)


async def ask(stack: Stack, name: str, path: str) -> Answer:
    return await get(stack.metrics_url(name).replace("/metrics", path))
