"""Signing in to the console with a key: whose session it is, how it ends, and what no page of others can do with it."""

import asyncio
import base64
import os
import ssl
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from datetime import UTC, datetime, timedelta
from pathlib import Path

import httpx
import pytest
from opentelemetry import metrics, trace
from pydantic import ValidationError

from deploy.local.process import Process
from deploy.local.stack import Stack
from runtime.scopes import SCOPES
from services.http import console
from services.http.front import Front
from services.http.gateway import Gateway
from services.http.metrics import HttpMetrics
from services.http.settings import HttpSettings
from tests.support.certificates import Authority
from tests.support.credentials import KeyFile
from tests.support.form_browser import SIGN_IN, TOKEN, Browser, browsing
from tests.support.http_events import events_of
from tests.support.http_fronts import running_front

PATIENCE = 60


class Guarded:
    """A gateway that asks who calls, and fronts of it that share sessions."""

    def __init__(self, folder: Path) -> None:
        self.keys = KeyFile(folder / "keys.json")
        # All before the gateway reads the file.
        self.key = self.keys.add(SCOPES)
        self.submits = self.keys.add(["jobs:submit"])
        self.revocable = self.keys.add(SCOPES)
        self.streaming = self.keys.add(SCOPES)
        self.reads_jobs = self.keys.add(["jobs:read"], user_id="nobody-yet")
        self.bound = self.keys.add(["jobs:read", "jobs:submit", "models:read"], user_id="alice")
        self.bound_submits = self.keys.add(["jobs:submit"], user_id="alice")
        self.reads_models = self.keys.add(["models:read"])
        self.expired = self.keys.add(SCOPES, not_after=datetime.now(UTC) - timedelta(seconds=1))
        self.session_keys = folder / "session-keys"
        self.session_keys.write_text(new_key())
        self.gateway = ""
        self.address = ""

    @property
    def settings(self) -> dict[str, str]:
        """The settings of a further front."""
        return {"HTTP_GATEWAY": self.gateway, "HTTP_SESSION_KEY_FILE": str(self.session_keys)}


def new_key() -> str:
    return base64.b64encode(os.urandom(32)).decode() + "\n"


@pytest.fixture(scope="module")
async def guarded(stack: Stack, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Guarded]:
    guarded = Guarded(tmp_path_factory.mktemp("sign-in"))
    gateway = stack.add("gateway", {"GATEWAY_ROLE": "api", "GATEWAY_API_KEYS_FILE": str(guarded.keys.path)})
    await gateway.start()
    await gateway.wait_ready()
    guarded.gateway = stack.address(gateway.name)
    async with running_front(stack, **guarded.settings) as front:
        guarded.address = front.address
        yield guarded
    await gateway.terminate()


@pytest.fixture
async def browser(guarded: Guarded) -> AsyncIterator[Browser]:
    async with browsing(guarded.address) as browser:
        yield browser


async def until_signed_out(browser: Browser) -> None:
    async with asyncio.timeout(PATIENCE):
        while await browser.signed_in():  # noqa: ASYNC110  # nothing tells that the gateway has read the file
            await asyncio.sleep(0.1)


async def until_logged(process: Process, words: str) -> None:
    async with asyncio.timeout(PATIENCE):
        while words not in process.log:  # noqa: ASYNC110  # another process writes it
            await asyncio.sleep(0.1)


# Signing in and out


async def test_the_playground_keeps_a_text_whose_session_has_ended(guarded: Guarded, browser: Browser) -> None:
    """Whether the gateway refuses the credential, or the session itself is gone."""
    form = {"user_id": "me", "model": "docstrings", "max_tokens": "1", "text": "a long <prompt>"}
    for ending in ("revoked", "expired"):
        key = guarded.keys.add(SCOPES)
        async with asyncio.timeout(PATIENCE):
            while (await browser.sign_in(key)).status_code != 303:  # noqa: ASYNC110  # as until_signed_out
                await asyncio.sleep(0.1)
        await browser.get("/console/playground")
        if ending == "revoked":
            guarded.keys.revoke(key)
            await until_signed_out(browser)
        else:
            browser.client.cookies.clear()
        answer = await browser.post("/console/playground", **form)
        assert answer.status_code == 401, ending
        assert answer.headers["www-authenticate"].startswith("Bearer")
        assert "a long &lt;prompt&gt;</textarea>" in answer.text
        assert '<option value="docstrings" selected>' in answer.text
        assert f'href="{SIGN_IN}?next=%2Fconsole%2Fplayground"' in answer.text
        # Who has signed in in another tab sends it once more.
        old = browser.token
        await browser.sign_in(guarded.key)
        browser.token = old
        again = await browser.post("/console/playground", **form)
        assert again.status_code == 403
        assert "a long &lt;prompt&gt;</textarea>" in again.text
        token = TOKEN.search(again.text)
        assert token is not None
        browser.token = token[1]
        assert (await browser.post("/console/playground", **form)).status_code == 303
        browser.client.cookies.clear()


async def test_a_page_leaves_out_what_the_key_has_no_scope_for(guarded: Guarded, browser: Browser) -> None:
    await browser.sign_in(guarded.reads_jobs)
    page = await browser.get("/console/")
    assert page.status_code == 200, page.text
    browser.client.cookies.clear()
    await browser.sign_in(guarded.reads_models)
    page = await browser.get("/console/models")
    assert page.status_code == 200, page.text
    assert "docstrings" in page.text
    assert ">Workers</h2>" not in page.text
    browser.client.cookies.clear()
    await browser.sign_in(guarded.key)
    assert ">Workers</h2>" in (await browser.get("/console/models")).text


async def test_who_has_not_signed_in_is_led_to_the_form_and_back(guarded: Guarded, browser: Browser) -> None:
    asked = await browser.get("/console/?state=JOB_STATE_FAILED")
    assert (asked.status_code, asked.headers["location"]) == (
        303,
        f"{SIGN_IN}?next=%2Fconsole%2F%3Fstate%3DJOB_STATE_FAILED",
    )
    form = await browser.follow(asked, to=SIGN_IN)
    assert form.headers["cache-control"] == "no-store"
    assert "/console/?state=JOB_STATE_FAILED" in form.text
    answer = await browser.post(SIGN_IN, key=guarded.key, next="/console/?state=JOB_STATE_FAILED")
    assert (answer.status_code, answer.headers["location"]) == (303, "/console/?state=JOB_STATE_FAILED")
    page = await browser.get("/console/")
    assert page.status_code == 200
    # The part of the key that may be shown is shown, and no more of it.
    assert guarded.key.rpartition("_")[0] in page.text
    assert guarded.key.rpartition("_")[2] not in page.text
    # Who has signed in need not do so again.
    assert (await browser.get(SIGN_IN)).headers["location"] == "/console/"


async def test_a_module_of_an_open_page_is_told_that_it_must_sign_in(browser: Browser) -> None:
    """It follows no redirect to a page that is not for it."""
    answer = await browser.get("/console/", **{"Sec-Fetch-Mode": "cors", "Sec-Fetch-Site": "same-origin"})
    assert answer.status_code == 401


async def test_a_key_that_does_not_count_signs_nobody_in(stack: Stack, guarded: Guarded) -> None:
    refused = ("llmk_unknown_secret", guarded.expired, "nonsense")
    # A front of its own: failed attempts are counted.
    async with running_front(stack, **guarded.settings) as front, browsing(front.address) as browser:
        for key in (*refused, "no\nkey", "schlüssel", "", "x" * 20_000):
            answer = await browser.sign_in(key)
            # What no credential looks like is not sent to the gateway.
            assert answer.status_code == (401 if key in refused else 400), key
            assert not key or key not in answer.text
            assert not await browser.signed_in()


async def test_a_key_with_any_scope_signs_in(guarded: Guarded, browser: Browser) -> None:
    """What it lacks is told where it is needed."""
    assert (await browser.sign_in(guarded.submits)).status_code == 303
    page = await browser.get("/console/")
    assert page.status_code == 403
    assert "jobs:read" in page.text
    assert 'class="button" href="/console/playground"' in page.text, "it leads to what the key is for"


async def test_the_playground_is_for_a_key_that_may_only_submit(guarded: Guarded, browser: Browser) -> None:
    """It says what it cannot show."""
    await browser.sign_in(guarded.submits)
    page = await browser.get("/console/playground")
    assert page.status_code == 200
    assert "may not list the models" in page.text
    form = {"user_id": "submits-only", "model": "docstrings", "max_tokens": "1", "text": "x"}
    answer = await browser.post("/console/playground", **form)
    assert answer.status_code == 200
    assert "<code>llmjob-submits--only-play" in answer.text
    assert "may not read jobs" in answer.text


async def test_the_playground_knows_the_user_of_a_key(guarded: Guarded, browser: Browser) -> None:
    """Also of one that may do nothing but submit."""
    for key, user in ((guarded.bound, "alice"), (guarded.bound_submits, "alice"), (guarded.key, "console")):
        await browser.sign_in(key)
        assert f'name="user_id" type="text" value="{user}"' in (await browser.get("/console/playground")).text
        browser.client.cookies.clear()


async def test_a_form_has_each_of_its_fields_once(guarded: Guarded, browser: Browser) -> None:
    await browser.sign_in(guarded.key)
    await browser.get("/console/playground")
    form = {"user_id": "me", "model": "docstrings", "max_tokens": "1", "text": "x", "priority": "1"}
    answer = await browser.post("/console/playground", **form)
    assert (answer.status_code, "priority" in answer.text) == (400, True)
    own = {"Origin": browser.origin, "Content-Type": "application/x-www-form-urlencoded"}
    body = f"csrf_token={browser.token}&text=a&text=b"
    answer = await browser.client.post("/console/playground", content=body, headers=own)
    assert (answer.status_code, "is there more than once" in answer.text) == (400, True)


async def test_signing_out_is_a_form_and_forgets_the_key(guarded: Guarded, browser: Browser) -> None:
    await browser.sign_in(guarded.key)
    assert await browser.signed_in()
    assert (await browser.get("/console/signout")).status_code == 405
    assert await browser.signed_in()
    answer = await browser.post("/console/signout")
    assert (answer.status_code, answer.headers["location"]) == (303, SIGN_IN)
    assert not await browser.signed_in()


@pytest.mark.parametrize("somebody_else", [False, True])
async def test_a_page_under_way_does_not_undo_signing_out(stack: Stack, guarded: Guarded, somebody_else: bool) -> None:
    """Its answer renews the session that its request had, and comes after the answer to the form."""
    async with (
        running_front(stack, **guarded.settings, HTTP_SESSION_IDLE="PT40S") as front,
        browsing(front.address) as browser,
        browsing(front.address) as twin,
    ):
        await browser.sign_in(guarded.key)
        await browser.get("/console/")
        async with asyncio.timeout(PATIENCE):
            twin.client.cookies = httpx.Cookies(browser.client.cookies)
            while "set-cookie" not in (late := await twin.get("/console/")).headers:  # noqa: ASYNC110
                await asyncio.sleep(0.2)
        assert await twin.signed_in()
        assert (await browser.post("/console/signout")).status_code == 303
        if somebody_else:
            assert (await browser.sign_in(guarded.reads_jobs)).status_code == 303
        browser.client.cookies.extract_cookies(late)
        page = await browser.get("/console/")
        assert page.status_code == 303
        # The browser forgets it, and the person can sign in.
        assert "llm_session" not in browser.client.cookies
        assert (await browser.sign_in(guarded.reads_jobs)).status_code == 303
        assert await browser.signed_in()


async def test_a_revoked_key_ends_the_session(guarded: Guarded, browser: Browser) -> None:
    await browser.sign_in(guarded.revocable)
    assert await browser.signed_in()
    guarded.keys.revoke(guarded.revocable)
    await until_signed_out(browser)
    # The way to sign in leads to the form, which says why once, and not back to the page at once.
    shown = await browser.get(SIGN_IN)
    assert shown.status_code == 200
    assert "the gateway no longer takes its credential" in shown.text
    assert "role=alert" not in (await browser.get(SIGN_IN)).text.replace('"', "")


async def test_a_page_follows_a_job_with_the_key_of_its_session(
    stack: Stack, guarded: Guarded, browser: Browser
) -> None:
    """Its stream ends with the reason when the key is revoked."""
    asked = {"user_id": "u", "request_id": "signed-in", "model": "idle", "prompt": "x"}
    headers = {"Authorization": f"Bearer {guarded.streaming}"}
    job = await browser.client.post("/jobs", json=asked, headers=headers)
    path = f"/console/jobs/{job.json()['workflow_id']}/events"
    module = {"Sec-Fetch-Mode": "cors", "Accept": "text/event-stream"}
    assert (await browser.get(path, **module)).status_code == 401
    await browser.sign_in(guarded.streaming)
    async with browser.client.stream("GET", path, headers=module) as stream:
        assert stream.status_code == 200
        events = events_of(stream)
        assert (await anext(events)).name == "update"
        guarded.keys.revoke(guarded.streaming)
        last = [event async for event in events][-1]
    assert (last.name, last.json["status"]) == ("problem", 401)
    assert (await browser.get(path, **module)).status_code == 401


@pytest.mark.parametrize(
    "module",
    [
        {"Sec-Fetch-Mode": "cors"},
        # Browsers send no Sec-Fetch-Mode to a host elsewhere by http.
        {"X-Requested-With": "fetch"},
        {"Accept": "text/event-stream"},
    ],
)
async def test_a_session_ends_with_its_idle_time_and_its_lifetime(
    stack: Stack, guarded: Guarded, module: dict[str, str]
) -> None:
    """A page that refreshes itself is no sign of a person."""
    for settings in ({"HTTP_SESSION_IDLE": "PT3S"}, {"HTTP_SESSION_LIFETIME": "PT3S"}):
        async with (
            running_front(stack, **guarded.settings, **settings) as front,
            browsing(front.address) as browser,
        ):
            await browser.sign_in(guarded.key)
            async with asyncio.timeout(PATIENCE):
                while (await browser.get("/console/", **module)).status_code == 200:  # noqa: ASYNC110
                    await asyncio.sleep(0.2)
            assert not await browser.signed_in()
    # With time enough it goes on.
    async with browsing(guarded.address) as browser:
        await browser.sign_in(guarded.key)
        assert await browser.signed_in()


async def test_a_session_that_is_used_outlives_its_idle_time(stack: Stack, guarded: Guarded) -> None:
    idle = 8.0
    async with (
        running_front(stack, **guarded.settings, HTTP_SESSION_IDLE=f"PT{idle:g}S") as front,
        browsing(front.address) as browser,
    ):
        await browser.sign_in(guarded.key)
        began = asyncio.get_running_loop().time()
        while asyncio.get_running_loop().time() < began + 1.5 * idle:
            assert await browser.signed_in()
            await asyncio.sleep(0.2)


async def test_without_authentication_nobody_signs_in(stack: Stack, http: httpx.AsyncClient) -> None:
    async with browsing(stack.address("http")) as browser:
        assert await browser.signed_in()
        assert "/console/signout" not in (await browser.get("/console/")).text
        assert (await browser.get(f"{SIGN_IN}?next=/console/models")).headers["location"] == "/console/models"


# Fronts


async def test_fronts_share_sessions_and_their_keys_can_be_rotated(stack: Stack, guarded: Guarded) -> None:
    async with (
        running_front(stack, **guarded.settings) as other,
        browsing(guarded.address) as browser,
        browsing(other.address) as elsewhere,
    ):
        await browser.sign_in(guarded.key)
        # A balancer in front of the fronts has one name. Here the cookies follow by hand.
        elsewhere.client.cookies = browser.client.cookies
        assert await elsewhere.signed_in()
        old = guarded.session_keys.read_text()
        # The new key signs, the old one still counts.
        guarded.session_keys.write_text(new_key() + old)
        await until_logged(other.process, "changed session keys are in use")
        assert await elsewhere.signed_in()
        guarded.session_keys.write_text("nonsense")
        await until_logged(other.process, "changed session keys cannot be used")
        assert await elsewhere.signed_in()
        guarded.session_keys.write_text(new_key())
        await until_signed_out(elsewhere)


def test_a_front_for_others_needs_keys_of_sessions(guarded: Guarded) -> None:
    """On loopback one without them makes a key of its own."""
    with pytest.raises(ValidationError, match=r"HTTP_SESSION_KEY_FILE.*HTTP_CONSOLE=false"):
        HttpSettings(host="0.0.0.0")
    assert HttpSettings(host="0.0.0.0", console=False).session_key_file is None
    assert HttpSettings(host="0.0.0.0", session_key_file=guarded.session_keys).console
    assert HttpSettings().session_key_file is None


async def test_a_session_outlives_its_front(stack: Stack, guarded: Guarded) -> None:
    async with running_front(stack, HTTP_GATEWAY=guarded.gateway) as front, browsing(front.address) as browser:
        await browser.sign_in(guarded.key)
        await browser.get("/console/")
        await front.process.kill()
        await front.process.start()
        await front.process.wait_ready()
        # A form of a page from before the death can still be sent.
        assert (await browser.post("/console/signout")).status_code == 303


@pytest.mark.parametrize("content", ["", "c2hvcnQ=\n", "nonsense\n", "§\n"])
async def test_a_bad_file_of_keys_ends_the_front(stack: Stack, tmp_path: Path, content: str) -> None:
    (tmp_path / "session-keys").write_text(content)
    process = stack.add("http", {"HTTP_SESSION_KEY_FILE": str(tmp_path / "session-keys")})
    await process.start()
    assert await process.wait() == 1
    assert "HTTP_SESSION_KEY_FILE" in process.log
    assert not content.strip() or content.strip() not in process.log


# Cookies


async def test_cookies_are_for_the_front_alone(stack: Stack, guarded: Guarded, tmp_path: Path) -> None:
    ca = Authority(tmp_path)
    trust = ssl.create_default_context(cafile=str(ca.path))
    pair = ca.issue("front")
    async with AsyncExitStack() as opened:
        tls = await opened.enter_async_context(
            running_front(stack, scheme="https", verify=trust, **guarded.settings, **pair.environment("HTTP_TLS_"))
        )
        proxied = await opened.enter_async_context(
            running_front(stack, **guarded.settings, HTTP_PUBLIC_URL="https://llm.example")
        )
        for front in (tls, proxied):
            (cookie,) = (await front.client.get(SIGN_IN)).headers.get_list("set-cookie")
            assert cookie.startswith("__Host-llm_csrf=")
            assert attributes(cookie) == {"path=/", "httponly", "samesite=lax", "secure"}
        # They are taken, too.
        async with browsing(tls.address, scheme="https", verify=trust) as browser:
            signed_in = await browser.sign_in(guarded.key)
            cookies = signed_in.headers.get_list("set-cookie")
            assert sorted(cookie.partition("=")[0] for cookie in cookies) == ["__Host-llm_csrf", "__Host-llm_session"]
            for cookie in cookies:
                assert any(name.startswith("max-age=") for name in attributes(cookie))
                assert {"path=/", "httponly", "samesite=lax", "secure"} < attributes(cookie)
            assert await browser.signed_in()
    async with browsing(guarded.address) as browser:
        cookie = (await browser.get(SIGN_IN)).headers["set-cookie"]
        assert cookie.startswith("llm_csrf=")
        assert attributes(cookie) == {"path=/", "httponly", "samesite=lax"}
        assert guarded.key not in (await browser.sign_in(guarded.key)).headers["set-cookie"]


def attributes(cookie: str) -> set[str]:
    return {part.strip().lower() for part in cookie.split(";")[1:]}


async def test_cookies_that_are_none_of_the_fronts_are_overlooked(guarded: Guarded, browser: Browser) -> None:
    await browser.sign_in(guarded.key)
    good = browser.client.cookies["llm_session"]
    csrf = browser.client.cookies["llm_csrf"]
    values = ("", "1.", "1.x", "2." + good[2:], "3.x", "9.x", ".", "1." + good[3:], "1." + "A" * 3000, '"', "1.é")
    cookies = [f"llm_csrf={csrf}; llm_session={value}" for value in values]
    cookies += [f"llm_csrf={value}; llm_session={good}" for value in (*values, "1." + "A" * 43)]
    cookies += [f"llm_session={good}"]
    async with browsing(guarded.address) as stranger:
        for cookie in cookies:
            stranger.client.cookies.clear()
            answer = await stranger.client.get("/console/", headers=[(b"Cookie", cookie.encode())])
            assert answer.status_code == 303, cookie
        # What is too large for the head of a request may be refused before.
        stranger.client.cookies.clear()
        answer = await stranger.client.get("/console/", headers={"Cookie": "llm_session=" + "A" * 100_000})
        assert answer.status_code in (303, 400, 431)
    assert await browser.signed_in()


async def test_a_long_credential_is_spread_over_cookies(guarded: Guarded, browser: Browser) -> None:
    """Nothing but its session's size keeps it out: the gateway says that it does not count."""
    answer = await browser.sign_in("x" * 7000)
    assert answer.status_code == 401
    assert "does not take this key" in answer.text


# Forms


async def test_every_form_of_the_console_needs_a_token(guarded: Guarded, browser: Browser) -> None:
    async with Gateway(HttpSettings(), trace.get_tracer(__name__)) as gateway:
        front = Front(HttpSettings(), gateway, HttpMetrics(metrics.get_meter(__name__)))
        resources = console.package(front).resources
    forms = [resource.path for resource in resources if resource.methods.keys() - {"GET"}]
    assert len(forms) > 4
    await browser.sign_in(guarded.key)
    for path in forms:
        browser.token = "wrong"
        answer = await browser.post(path.replace("{id:id}", "llmjob-no-one"))
        assert (answer.status_code, "CSRF_TOKEN_INVALID" in answer.text) == (403, True), path
        answer = await browser.client.post(path.replace("{id:id}", "llmjob-no-one"))
        assert (answer.status_code, "ORIGIN_NOT_ALLOWED" in answer.text) == (403, True), path
    assert await browser.signed_in()


@pytest.mark.parametrize("signed_in", [True, False])
async def test_a_form_needs_the_token_of_its_session(guarded: Guarded, browser: Browser, signed_in: bool) -> None:
    async with browsing(guarded.address) as other:
        if signed_in:
            await browser.sign_in(guarded.key)
            await other.sign_in(guarded.key)
        path = "/console/" if signed_in else SIGN_IN
        await other.get(path)
        await browser.get(path)
        own = browser.token
        for token in ("", "wrong", "ä", own[:-1], other.token):
            browser.token = token
            for action, fields in (("/console/signout", {}), (SIGN_IN, {"key": guarded.key})):
                answer = await browser.post(action, **fields)
                assert (answer.status_code, "CSRF_TOKEN_INVALID" in answer.text) == (403, True)
        assert await browser.signed_in() is signed_in
        browser.token = own
        assert (await browser.post("/console/signout")).status_code == 303


async def test_the_token_changes_with_signing_in(guarded: Guarded, browser: Browser) -> None:
    """A session that somebody has put into the browser before is not the one that holds the key."""
    await browser.get(SIGN_IN)
    before, cookie = browser.token, browser.client.cookies["llm_csrf"]
    await browser.sign_in(guarded.key)
    await browser.get("/console/")
    assert browser.token != before
    browser.client.cookies["llm_csrf"] = cookie
    assert not await browser.signed_in()


@pytest.mark.parametrize(
    "headers",
    [
        {"Origin": "https://elsewhere.example", "Sec-Fetch-Site": "cross-site"},
        {"Origin": "null"},
        {"Origin": ""},
        {"Sec-Fetch-Site": "same-site"},
        {"Sec-Fetch-Site": "cross-site"},
        {"Sec-Fetch-Site": "none"},
    ],
)
async def test_pages_of_others_cannot_send_a_form(guarded: Guarded, browser: Browser, headers: dict[str, str]) -> None:
    await browser.sign_in(guarded.key)
    await browser.get("/console/")
    answer = await browser.post("/console/signout", headers)
    assert (answer.status_code, "ORIGIN_NOT_ALLOWED" in answer.text) == (403, True)
    assert await browser.signed_in()


async def test_pages_that_may_call_the_api_cannot_send_a_form(stack: Stack, guarded: Guarded) -> None:
    page = "https://app.example"
    async with (
        running_front(stack, **guarded.settings, HTTP_CORS_ORIGINS=page) as front,
        browsing(front.address) as browser,
    ):
        await browser.sign_in(guarded.key)
        await browser.get("/console/")
        assert (await browser.post("/console/signout", {"Origin": page})).status_code == 403


async def test_without_authentication_forms_need_their_token_too(stack: Stack) -> None:
    async with browsing(stack.address("http")) as browser:
        await browser.get("/console/")
        browser.token = "wrong"
        assert (await browser.post("/console/signout")).status_code == 403


@pytest.mark.parametrize(
    "following",
    [
        "//evil.example",
        "/\\evil.example",
        "\\\\evil.example",
        "https://evil.example/console/",
        "javascript:alert(1)",
        "/console/\\evil.example",
        "/console/\n//evil.example",
        "/console/\x00",
        "/console",
        "/consoles/",
        "/v1/models",
        "/console/" + "x" * 3000,
        "/console/signin?next=/console/signin",
        "",
    ],
)
async def test_signing_in_leads_to_no_other_server(guarded: Guarded, browser: Browser, following: str) -> None:
    await browser.get(SIGN_IN)
    answer = await browser.post(SIGN_IN, key=guarded.key, next=following)
    assert (answer.status_code, answer.headers["location"]) == (303, "/console/")
    asked = await browser.client.get(SIGN_IN, params={"next": following})
    assert asked.headers["location"] == "/console/"


# Bounds


async def test_failed_attempts_are_bounded(stack: Stack, guarded: Guarded) -> None:
    async with running_front(stack, **guarded.settings) as front, browsing(front.address) as browser:
        answers = [await browser.sign_in(f"llmk_no_{number}") for number in range(10)]
        assert {answer.status_code for answer in answers} == {401}
        async with asyncio.timeout(PATIENCE):
            # On a slow machine one or the other may have become free again.
            while (answer := await browser.sign_in("llmk_no_more")).status_code == 401:
                pass
        assert answer.status_code == 429
        assert int(answer.headers["retry-after"]) > 0
        # Whoever has signed in is not held up.
        async with browsing(guarded.address) as elsewhere:
            await elsewhere.sign_in(guarded.key)
            browser.client.cookies = elsewhere.client.cookies
            assert await browser.signed_in()


async def test_the_key_is_in_no_log(stack: Stack, guarded: Guarded) -> None:
    async with (
        running_front(stack, **guarded.settings) as front,
        browsing(front.address) as browser,
    ):
        await browser.sign_in(guarded.key)
        assert await browser.signed_in()
        await browser.post("/console/signout")
        await browser.sign_in("llmk_wrong_secret-of-somebody")
        assert guarded.key not in front.process.log
        assert "secret-of-somebody" not in front.process.log
