"""Signing in to the console with an OpenID provider, which a small real one plays."""

import asyncio
import ssl
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from datetime import timedelta
from pathlib import Path
from urllib.parse import parse_qs, urlencode, urlsplit

import grpc
import httpx
import pytest
from pydantic import ValidationError

from deploy.local.stack import Stack
from llm_pb import llm_pb2, llm_pb2_grpc
from runtime.environment import setting_problems
from runtime.scopes import SCOPES
from services.http.settings import HttpSettings
from services.http.signin.issuer import Issuer
from services.http.signin.signed_in import CREDENTIAL_BYTES
from tests.support.certificates import Authority
from tests.support.form_browser import SIGN_IN, Browser, browsing
from tests.support.http_fronts import running_front
from tests.support.openid_provider import CLIENT_ID, CLIENT_SECRET, KID, OpenIdProvider

BEGIN = f"{SIGN_IN}/oidc"
CALLBACK = f"{BEGIN}/callback"
PUBLIC_URL = "http://localhost"
"""Where the provider sends browsers back to. In these tests they go to the front itself."""
PATIENCE = 60


class Site:
    """A gateway that takes the tokens of a provider."""

    def __init__(self, folder: Path, provider: OpenIdProvider) -> None:
        self.provider = provider
        self.secret = folder / "client-secret"
        self.secret.write_text(CLIENT_SECRET + "\n")
        self.gateway = ""

    @asynccontextmanager
    async def browser(self, stack: Stack, **settings: str) -> AsyncIterator[Browser]:
        """Open a browser at a front of its own."""
        own = {
            "HTTP_GATEWAY": self.gateway,
            "HTTP_PUBLIC_URL": PUBLIC_URL,
            "HTTP_OIDC_ISSUER": self.provider.url,
            "HTTP_OIDC_CLIENT_ID": CLIENT_ID,
            "HTTP_OIDC_CLIENT_SECRET_FILE": str(self.secret),
            **settings,
        }
        async with running_front(stack, **own) as running, browsing(running.address) as browser:
            yield browser


async def begin(browser: Browser, following: str = "/console/") -> str:
    """Begin to sign in; return where the provider sends the browser back to."""
    answer = await browser.get(f"{BEGIN}?next={following}")
    assert answer.status_code == 303, answer.text
    async with httpx.AsyncClient(trust_env=False, timeout=60) as client:
        agreed = await client.get(answer.headers["location"])
    assert agreed.status_code == 302
    back: str = agreed.headers["location"]
    assert back.startswith(f"{PUBLIC_URL}{CALLBACK}?")
    return back.removeprefix(PUBLIC_URL)


async def sign_in(browser: Browser) -> httpx.Response:
    """Sign in; return the answer to the way back."""
    return await browser.get(await begin(browser))


async def until_it_is_asked(browser: Browser) -> None:
    """Return once the front has found a provider that is back."""
    async with asyncio.timeout(PATIENCE):
        while (await browser.get(BEGIN)).status_code == 503:  # noqa: ASYNC110  # nothing tells that it is asked
            await asyncio.sleep(0.2)


@pytest.fixture(scope="module")
async def site(stack: Stack, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Site]:
    site = Site(tmp_path_factory.mktemp("oidc"), OpenIdProvider())
    async with site.provider.serving():
        gateway = stack.add("gateway", {"GATEWAY_ROLE": "api", **site.provider.gateway})
        await gateway.start()
        await gateway.wait_ready()
        site.gateway = stack.address(gateway.name)
        yield site
        await gateway.terminate()


@pytest.fixture
def provider(site: Site) -> Iterator[OpenIdProvider]:
    """The provider, which behaves again as always afterwards."""
    usual = vars(OpenIdProvider())
    yield site.provider
    for name in ("life", "refreshes", "claims", "refused", "padding"):
        setattr(site.provider, name, usual[name])


async def test_signing_in_leads_to_the_provider_and_back(stack: Stack, site: Site) -> None:
    async with site.browser(stack) as browser:
        form = await browser.follow(await browser.get("/console/?model=x"), to=SIGN_IN)
        # A link, for a form may not lead to another server.
        assert f'href="{BEGIN}?next=/console/%3Fmodel%3Dx"' in form.text
        asked = await browser.get(f"{BEGIN}?next=/console/%3Fmodel%3Dx")
        (cookie,) = asked.headers.get_list("set-cookie")
        assert {"httponly", "samesite=lax", "max-age=600"} <= {part.strip().lower() for part in cookie.split(";")}
        query = parse_qs(urlsplit(asked.headers["location"]).query)
        assert query["scope"] == ["openid"]
        assert query["redirect_uri"] == [PUBLIC_URL + CALLBACK]
        back = await begin(browser, "/console/%3Fmodel%3Dx")
        answer = await browser.get(back)
        assert (answer.status_code, answer.headers["location"]) == (303, "/console/?model=x")
        assert "llm_oidc" not in browser.client.cookies
        page = await browser.get("/console/")
        assert page.status_code == 200
        assert "ada@example.org" in page.text
        # Each sign-in has a state, a nonce and a challenge of its own.
        first, second = site.provider.asked[-2:] if len(site.provider.asked) > 1 else ({}, site.provider.asked[-1])
        assert not {first.get(name) for name in ("state", "nonce", "code_challenge")} & {*second.values()}


async def test_a_link_of_another_site_does_not_change_who_has_signed_in(stack: Stack, site: Site) -> None:
    async with site.browser(stack) as browser:
        signed_in = await sign_in(browser)
        assert signed_in.headers["cache-control"] == "no-store"
        answer = await browser.get(f"{BEGIN}?next=/console/models", **{"Sec-Fetch-Site": "cross-site"})
        assert (answer.status_code, answer.headers["location"]) == (303, "/console/models")


async def test_a_key_signs_in_too(stack: Stack, site: Site) -> None:
    """Any credential that the gateway takes."""
    async with site.browser(stack) as browser:
        token = site.provider.issuer.token(KID, SCOPES, iss=site.provider.url)
        assert (await browser.sign_in(token)).status_code == 303
        assert await browser.signed_in()


@pytest.mark.parametrize("change", ["state", "no cookie", "other browser", "iss", "no code", "wrong code", "cookie"])
async def test_an_answer_that_does_not_belong_to_the_sign_in_is_refused(stack: Stack, site: Site, change: str) -> None:
    async with site.browser(stack) as browser:
        back = urlsplit(await begin(browser))
        query = {name: values[0] for name, values in parse_qs(back.query).items()}
        match change:
            case "state":
                query["state"] = "another"
            case "no cookie":
                browser.client.cookies.clear()
            case "other browser":
                other = urlsplit(await begin(browser))
                query["code"] = parse_qs(other.query)["code"][0]
            case "iss":
                query["iss"] = "https://evil.example"
            case "no code":
                del query["code"]
            case "wrong code":
                query["code"] = "another"
            case "cookie":
                browser.client.cookies.clear()
                browser.client.cookies["llm_oidc"] = "1.nonsense"
        answer = await browser.get(f"{back.path}?{urlencode(query)}")
        assert answer.status_code in (400, 401)
        assert query.get("code", "no code") not in answer.text
        assert not await browser.signed_in()
        # A new sign-in succeeds.
        browser.client.cookies.clear()
        assert (await sign_in(browser)).status_code == 303


async def test_a_way_back_is_good_once(stack: Stack, site: Site) -> None:
    async with site.browser(stack) as browser:
        back = await begin(browser)
        begun = browser.client.cookies["llm_oidc"]
        assert (await browser.get(back)).status_code == 303
        browser.client.cookies.clear()
        assert (await browser.get(back)).status_code == 400
        # Whoever has the browser's cookie, too, meets the provider, which takes a code once.
        browser.client.cookies["llm_oidc"] = begun
        assert (await browser.get(back)).status_code == 401
        assert not await browser.signed_in()


@pytest.mark.parametrize(
    "claims",
    [
        {"nonce": "another"},
        {"nonce": None},
        {"aud": "another"},
        {"iss": "https://evil.example"},
        {"exp": 1},
        {"azp": "another"},
    ],
)
async def test_an_id_token_that_does_not_count_is_refused(
    stack: Stack, site: Site, provider: OpenIdProvider, claims: dict[str, object]
) -> None:
    provider.claims = claims
    async with site.browser(stack) as browser:
        answer = await sign_in(browser)
        assert answer.status_code == 401
        assert "has not signed you in" in answer.text
        assert not await browser.signed_in()


async def test_who_does_not_agree_is_told_so(stack: Stack, site: Site, provider: OpenIdProvider) -> None:
    provider.refused = True
    async with site.browser(stack) as browser:
        answer = await sign_in(browser)
        assert (answer.status_code, "has not signed you in" in answer.text) == (401, True)


async def test_a_token_that_the_gateway_does_not_take_signs_nobody_in(stack: Stack, site: Site) -> None:
    async with site.browser(stack, HTTP_OIDC_TOKEN="id") as browser:
        answer = await sign_in(browser)
        assert (answer.status_code, "does not take its token" in answer.text) == (401, True)
        assert not await browser.signed_in()


async def test_the_id_token_can_be_the_credential(
    stack: Stack, site: Site, provider: OpenIdProvider, tmp_path: Path
) -> None:
    own = {**provider.gateway, "GATEWAY_JWT_AUDIENCE": CLIENT_ID}
    gateway = stack.add("gateway", {"GATEWAY_ROLE": "api", **own})
    await gateway.start()
    await gateway.wait_ready()
    address = stack.address(gateway.name)
    async with site.browser(stack, HTTP_OIDC_TOKEN="id", HTTP_GATEWAY=address) as browser:
        assert (await sign_in(browser)).status_code == 303
        assert await browser.signed_in()
    await gateway.terminate()


async def test_long_tokens_are_kept_and_longer_ones_refused(stack: Stack, site: Site, provider: OpenIdProvider) -> None:
    provider.padding = "x" * 4500
    async with site.browser(stack) as browser:
        assert (await sign_in(browser)).status_code == 303
        assert await browser.signed_in()
        # Signing out, and a shorter one after it, leave no part of it behind.
        await browser.get("/console/models")
        assert (await browser.post("/console/signout")).status_code == 303
        assert not [name for name in browser.client.cookies if name.startswith("llm_session")]
        provider.padding = ""
        assert (await sign_in(browser)).status_code == 303
        assert [name for name in browser.client.cookies if name.startswith("llm_session")] == ["llm_session"]
        assert await browser.signed_in()
    provider.padding = "x" * 8500
    async with site.browser(stack) as browser:
        answer = await sign_in(browser)
        assert answer.status_code in (401, 413), answer.text
        assert not await browser.signed_in()


async def test_a_session_is_renewed_before_its_token_expires(
    stack: Stack, site: Site, provider: OpenIdProvider
) -> None:
    """Requests at once share one renewal, because the provider takes a refresh token once."""
    provider.life, provider.refreshes = 20, True
    async with site.browser(stack, HTTP_OIDC_SCOPES="openid offline_access") as browser:
        assert (await sign_in(browser)).status_code == 303
        provider.granted.clear()
        began = time.monotonic()
        module = {"Sec-Fetch-Mode": "cors"}
        while time.monotonic() < began + 2 * provider.life:
            answers = await asyncio.gather(*(browser.get("/console/", **module) for _ in range(3)))
            assert {answer.status_code for answer in answers} == {200}
            await asyncio.sleep(0.5)
        assert set(provider.granted) == {"refresh_token"}
        # Each at the half of its token's life.
        assert len(provider.granted) <= (time.monotonic() - began) / 10 + 1


async def test_a_renewed_token_is_no_sign_of_a_person(stack: Stack, site: Site, provider: OpenIdProvider) -> None:
    """The session of a page that only refreshes itself ends with its idle time."""
    provider.life, provider.refreshes = 8, True
    async with site.browser(stack, HTTP_SESSION_IDLE="PT12S") as browser:
        assert (await sign_in(browser)).status_code == 303
        module = {"Sec-Fetch-Mode": "cors"}
        async with asyncio.timeout(PATIENCE):
            while (await browser.get("/console/", **module)).status_code == 200:  # noqa: ASYNC110
                await asyncio.sleep(0.5)
        assert not await browser.signed_in()
        assert "refresh_token" in provider.granted


async def test_a_session_ends_with_a_token_that_cannot_be_renewed(
    stack: Stack, site: Site, provider: OpenIdProvider
) -> None:
    provider.life, provider.refreshes = 10, True
    async with site.browser(stack) as browser:
        assert (await sign_in(browser)).status_code == 303
        provider.refresh_tokens.clear()
        async with asyncio.timeout(PATIENCE):
            while await browser.signed_in():  # noqa: ASYNC110  # nothing tells that the token has expired
                await asyncio.sleep(0.2)


async def test_a_renewed_token_that_is_too_large_is_not_kept(
    stack: Stack, site: Site, provider: OpenIdProvider
) -> None:
    """The session goes on with the token that it has, and the person can sign in and out."""
    provider.life, provider.refreshes = 40, True
    async with site.browser(stack) as browser:
        assert (await sign_in(browser)).status_code == 303
        provider.padding = "x" * 8500
        provider.granted.clear()
        async with asyncio.timeout(PATIENCE):
            while not provider.granted:
                assert (await browser.get("/console/")).status_code == 200
                await asyncio.sleep(0.2)
            while (answer := await browser.get("/console/")).status_code == 200:  # noqa: ASYNC110
                await asyncio.sleep(0.2)
        assert answer.status_code == 303, answer.text
        assert (await browser.get(SIGN_IN)).status_code == 200
        assert (await browser.post("/console/signout")).status_code == 303
        provider.padding = ""
        assert (await sign_in(browser)).status_code == 303
        assert await browser.signed_in()


async def test_while_the_provider_is_away_a_page_says_so(stack: Stack, site: Site) -> None:
    away = OpenIdProvider()
    async with away.serving():
        pass
    async with site.browser(stack, HTTP_OIDC_ISSUER=away.url) as browser:
        answer = await browser.get(BEGIN)
        assert answer.status_code == 503
        assert "127.0.0.1 does not answer" in answer.text
        # A key is still good, and the provider once it is back.
        async with away.serving():
            await until_it_is_asked(browser)
            back = await begin(browser)
        answer = await browser.get(back)
        assert (answer.status_code, "does not answer" in answer.text) == (503, True)


async def test_a_provider_that_is_away_is_not_asked_again_at_once(stack: Stack, site: Site) -> None:
    away = OpenIdProvider(broken=True)
    async with away.serving(), site.browser(stack, HTTP_OIDC_ISSUER=away.url) as browser:
        began = time.monotonic()
        for _ in range(20):
            assert (await browser.get(BEGIN)).status_code == 503
        assert away.described <= 1 + (time.monotonic() - began) / 5
        # It does not use up the attempts with a key.
        token = site.provider.issuer.token(KID, SCOPES, iss=site.provider.url)
        assert (await browser.sign_in(token)).status_code == 303
        away.broken = False
        await until_it_is_asked(browser)


async def test_a_provider_that_is_away_is_used_as_it_was_last_known() -> None:
    provider = OpenIdProvider()
    async with provider.serving():
        settings = HttpSettings(public_url=PUBLIC_URL, oidc_issuer=provider.url, oidc_client_id=CLIENT_ID)
        issuer = Issuer(settings, metadata_lifetime=timedelta(0))
        url = await issuer.authorization_url("state", "nonce", "verifier")
        provider.broken = True
        assert await issuer.authorization_url("state", "nonce", "verifier") == url
        assert provider.described == 2


async def test_a_failed_way_back_is_forgotten_whoever_has_failed(stack: Stack, site: Site) -> None:
    gateway = stack.add("gateway", {"GATEWAY_ROLE": "api", **site.provider.gateway})
    await gateway.start()
    await gateway.wait_ready()
    own = {"HTTP_GATEWAY": stack.address(gateway.name), "HTTP_GATEWAY_RETRY": "PT0S"}
    async with site.browser(stack, **own) as browser:
        back = await begin(browser)
        await gateway.kill()
        answer = await browser.get(back)
        assert (answer.status_code, "the gateway does not answer" in answer.text) == (503, True)
        assert int(answer.headers["retry-after"]) > 0
        assert "llm_oidc" not in browser.client.cookies
        assert not any(name.startswith("llm_session") for name in browser.client.cookies)


async def test_the_gateway_takes_each_call_with_the_longest_token_of_a_session(
    stack: Stack, site: Site, provider: OpenIdProvider
) -> None:
    """A server of gRPC refuses some calls, drawn by chance, whose metadata are over its soft limit."""
    token = ""
    for padding in range(5000, 6000, 50):
        longer = provider.issuer.token(KID, SCOPES, iss=provider.url, padding="x" * padding)
        token = longer if len(longer) <= CREDENTIAL_BYTES else token
    assert len(token) > CREDENTIAL_BYTES - 100
    async with site.browser(stack) as browser:
        assert (await browser.sign_in(token)).status_code == 303
        assert await browser.signed_in()
    async with grpc.aio.insecure_channel(site.gateway) as channel:
        stub = llm_pb2_grpc.LlmServiceStub(channel)
        for _ in range(300):
            await stub.GetQuota(llm_pb2.GetQuotaRequest(), metadata=[("authorization", f"Bearer {token}")])


async def test_a_provider_with_a_certificate_of_an_own_ca(stack: Stack, site: Site, tmp_path: Path) -> None:
    ca = Authority(tmp_path)
    pair = ca.issue("provider")
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(pair.cert, pair.key)
    provider = OpenIdProvider(scheme="https")
    async with provider.serving(context):
        own = {"HTTP_OIDC_ISSUER": provider.url}
        async with site.browser(stack, **own) as browser:
            assert (await browser.get(BEGIN)).status_code == 503
        async with site.browser(stack, **own, HTTP_OIDC_TLS_CA=str(ca.path)) as browser:
            answer = await browser.get(BEGIN)
            assert answer.headers["location"].startswith(f"{provider.url}/authorize?")


@pytest.mark.parametrize("content", [b"", b" \n", b"\xff"])
def test_a_file_without_a_secret_makes_no_public_client(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "client-secret"
    file.write_bytes(content)
    with pytest.raises(ValidationError, match=r"client-secret (holds no secret|cannot be read)"):
        HttpSettings(oidc_client_secret_file=file)


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"HTTP_OIDC_ISSUER": "http://provider.example"}, "HTTP_OIDC_ISSUER"),
        ({"HTTP_PUBLIC_URL": "http://llm.example"}, "HTTP_PUBLIC_URL"),
        ({"HTTP_PUBLIC_URL": "https://llm.example/path"}, "HTTP_PUBLIC_URL"),
        ({"HTTP_PUBLIC_URL": ""}, "HTTP_PUBLIC_URL"),
        ({"HTTP_OIDC_CLIENT_ID": ""}, "HTTP_OIDC_CLIENT_ID"),
        ({"HTTP_OIDC_SCOPES": "email"}, "HTTP_OIDC_SCOPES"),
    ],
)
def test_settings_that_cannot_work_are_refused(settings: dict[str, str], problem: str) -> None:
    good = {
        "HTTP_PUBLIC_URL": "https://llm.example",
        "HTTP_OIDC_ISSUER": "https://provider.example/realm",
        "HTTP_OIDC_CLIENT_ID": "console",
    }
    own = {name.removeprefix("HTTP_").lower(): value for name, value in {**good, **settings}.items()}
    with pytest.raises(ValidationError) as found:
        HttpSettings(**own)  # type: ignore[arg-type]
    (message,) = setting_problems(found.value, (HttpSettings,))
    assert problem in message
