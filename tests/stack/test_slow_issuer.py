"""An issuer of tokens that hangs, trickles or answers oddly: what it holds of the process, and for how long."""

import asyncio
import gzip
import logging
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from datetime import timedelta
from pathlib import Path

import pytest
from aiohttp import web
from aiohttp.test_utils import RawTestServer

from runtime.auth import Caller, Presented, Refusal
from runtime.auth_jwt import JwtRules, Jwts
from runtime.auth_keys import ApiKeys
from runtime.jwt_keys import KeySet
from runtime.scopes import SCOPES
from tests.support.credentials import AUDIENCE, ISSUER, Issuer, KeyFile

PATIENCE = 120
TRICKLES = {
    "silence": b"",
    "headers": b"HTTP/1.1 200 OK\r\nX-Long: ",
    "body": b"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\n",
}


class SlowIssuer:
    """Accepts connections, begins an answer, and sends a byte of it now and then, without end."""

    def __init__(self, beginning: bytes) -> None:
        self._beginning = beginning
        self.asked = 0
        self.open = 0
        self.released = asyncio.Event()
        """Ends all answers."""

    @asynccontextmanager
    async def serving(self) -> AsyncIterator[str]:
        server = await asyncio.start_server(self._answer, "127.0.0.1", 0)
        try:
            yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/keys"
        finally:
            self.released.set()
            server.close()

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.asked += 1
        self.open += 1
        gone = asyncio.create_task(reader.read())
        try:
            writer.write(self._beginning)
            while not self.released.is_set() and not gone.done():
                if self._beginning:
                    writer.write(b" ")
                    await writer.drain()
                await asyncio.sleep(0.2)
        except ConnectionError:
            pass
        finally:
            gone.cancel()
            self.open -= 1
            writer.close()


def jwts(keys: KeySet) -> Jwts:
    rules = JwtRules(ISSUER, AUDIENCE, ("RS256",), timedelta(minutes=1), "scope", "", "")
    return Jwts(rules, keys, SCOPES)


async def outcome(known: Jwts, token: str) -> str:
    try:
        caller: Caller | None = await known.authenticate(Presented(token=token))
    except Refusal as refusal:
        return refusal.reason
    return "" if caller is not None else "none"


@pytest.mark.parametrize("kind", TRICKLES)
async def test_a_fetch_ends_although_its_answer_does_not(kind: str, caplog: pytest.LogCaptureFixture) -> None:
    """The issuer sees the end of the connection, and the log has the reason."""
    issuer = SlowIssuer(TRICKLES[kind])
    async with issuer.serving() as url, asyncio.timeout(PATIENCE):
        keys = KeySet(url, retry_interval=timedelta(0))
        with caplog.at_level(logging.ERROR):
            await keys.refresh()
        (record,) = caplog.records
        assert "no answer within 5 s" in record.getMessage()
        while issuer.open:  # noqa: ASYNC110  nobody tells
            await asyncio.sleep(0.05)
        await keys.refresh()
        assert issuer.asked == 2, "the issuer is asked again"


async def test_no_odd_answer_replaces_the_last_keys() -> None:
    """A redirect is not followed: it could lead from TLS to none. A large answer does not count, compressed or not."""
    real = Issuer("known")
    large = Issuer("other").key_set() + b" " * (2 << 20)
    answers: list[web.Response | Exception] = [
        web.Response(body=real.key_set()),
        web.HTTPFound("/elsewhere"),
        web.HTTPTemporaryRedirect("/elsewhere"),
        web.Response(body=Issuer("other").key_set(), status=500),
        web.Response(body=large),
        web.Response(body=gzip.compress(large), headers={"content-encoding": "gzip"}),
    ]
    paths = list[str]()

    async def answer(request: web.BaseRequest) -> web.StreamResponse:
        paths.append(request.path)
        if request.path == "/elsewhere":
            return web.Response(body=Issuer("other").key_set())
        following = answers[len(paths) - 1]
        if isinstance(following, Exception):
            raise following
        return following

    async with RawTestServer(answer) as server:
        keys = KeySet(str(server.make_url("/keys")), lifetime=timedelta(0), retry_interval=timedelta(0))
        known = jwts(keys)
        for _ in answers:
            await keys.refresh()
            assert await outcome(known, real.token("known")) == ""
    assert paths == ["/keys"] * len(answers)


async def test_an_issuer_that_hangs_delays_no_revocation(tmp_path: Path) -> None:
    """Of an API key: it needs a thread of the default pool, and fetches take none, however many there were."""
    file, issuer = KeyFile(tmp_path / "keys.json"), SlowIssuer(TRICKLES["headers"])
    key = file.add(["jobs:read"])
    known = ApiKeys(file.path, SCOPES)
    async with issuer.serving() as url, asyncio.timeout(PATIENCE):
        asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(1))
        keys = KeySet(url, retry_interval=timedelta(0))
        fetching = [asyncio.create_task(keys.refresh()) for _ in range(3)]
        while not issuer.asked:  # noqa: ASYNC110  nobody tells
            await asyncio.sleep(0.05)
        file.revoke(key)
        await known.refresh()
        with pytest.raises(Refusal):
            known.find(key)
        assert not any(fetch.done() for fetch in fetching)
        await asyncio.gather(*fetching)


async def test_an_issuer_that_hangs_holds_few_calls() -> None:
    """Only so many tokens of unknown keys wait for its answer; the others are refused at once."""
    real, issuer = Issuer("known"), SlowIssuer(TRICKLES["silence"])
    forged = [Issuer("forged").token("forged")] * 1000
    async with issuer.serving() as url, asyncio.timeout(PATIENCE):
        known = jwts(KeySet(url))
        calls = [asyncio.create_task(outcome(known, token)) for token in forged]
        done: set[asyncio.Task[str]] = set()
        while not done:
            done, waiting = await asyncio.wait(calls, timeout=0.1)
        assert 0 < len(waiting) <= 100
        assert {call.result() for call in done} == {"AUTHENTICATION_UNAVAILABLE"}
        assert await outcome(known, real.token("known")) == "AUTHENTICATION_UNAVAILABLE"
        assert {await call for call in calls} == {"AUTHENTICATION_UNAVAILABLE"}


async def test_a_token_does_not_wait_for_an_issuer_that_is_known_to_be_away() -> None:
    """A periodic fetch that will probably fail holds no call."""
    issuer = SlowIssuer(TRICKLES["silence"])
    forged = Issuer("forged").token("forged")
    async with issuer.serving() as url, asyncio.timeout(PATIENCE):
        keys = KeySet(url, retry_interval=timedelta(0))
        await keys.refresh()
        known = jwts(keys)
        refreshing = asyncio.create_task(keys.refresh())
        while issuer.asked < 2:  # noqa: ASYNC110  nobody tells
            await asyncio.sleep(0.05)
        assert await outcome(known, forged) == "AUTHENTICATION_UNAVAILABLE"
        assert not refreshing.done()
        await refreshing
