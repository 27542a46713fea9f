"""What a browser does with the console: keeps cookies, sends forms with hidden fields, says where they come from."""

import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from html import unescape
from typing import Any
from urllib.parse import urlsplit

import httpx

TOKEN = re.compile(r'name="csrf_token" value="([^"]*)"')
"""Finds the hidden field of a form."""
SIGN_IN = "/console/signin"


class Browser:
    """A browser. It follows no redirect by itself."""

    def __init__(self, client: httpx.AsyncClient) -> None:
        self.client = client
        self.token = ""
        """The hidden field of the last page that had a form."""

    @property
    def origin(self) -> str:
        return str(self.client.base_url).rstrip("/")

    async def get(self, path: str, **headers: str) -> httpx.Response:
        answer = await self.client.get(path, headers=headers)
        if found := TOKEN.search(answer.text):
            self.token = unescape(found[1])
        return answer

    async def post(self, path: str, headers: dict[str, str] | None = None, **fields: str) -> httpx.Response:
        """Send a form of the last page."""
        own = {"Origin": self.origin, "Sec-Fetch-Site": "same-origin", **(headers or {})}
        form = {"csrf_token": self.token, **fields}
        return await self.client.post(path, data=form, headers={name: value for name, value in own.items() if value})

    async def sign_in(self, key: str, following: str = "/console/") -> httpx.Response:
        """Sign in with a key from the page that asks for it; return the answer to its form."""
        asked = await self.get(f"{SIGN_IN}?next={following}")
        assert asked.status_code == 200, asked.text
        return await self.post(SIGN_IN, key=key, next=following)

    async def follow(self, answer: httpx.Response, *, to: str) -> httpx.Response:
        """Follow a redirect, which leads to a place."""
        assert answer.status_code == 303, answer.text
        assert urlsplit(answer.headers["location"])._replace(query="").geturl() == to
        return await self.get(answer.headers["location"])

    async def signed_in(self) -> bool:
        """Return whether pages are shown, and not the way to sign in."""
        answer = await self.get("/console/")
        assert answer.status_code in (200, 303), answer.text
        return answer.status_code == 200


@asynccontextmanager
async def browsing(address: str, *, scheme: str = "http", verify: Any = True) -> AsyncIterator[Browser]:
    """Open a browser of its own."""
    base = f"{scheme}://{address}"
    async with httpx.AsyncClient(base_url=base, verify=verify, timeout=60, trust_env=False) as client:
        yield Browser(client)
