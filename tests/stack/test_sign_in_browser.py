"""Signing in to the console in a real browser: what its pages' policy, its cookies and its forms let happen there."""

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from deploy.local.ports import free_port
from deploy.local.stack import Stack
from llm_pb import llm_pb2, llm_pb2_grpc
from runtime.scopes import SCOPES
from tests.support.browser import findings, new_page, running_browser
from tests.support.credentials import KeyFile
from tests.support.http_fronts import running_front
from tests.support.jobs import new_job
from tests.support.openid_provider import CLIENT_ID, CLIENT_SECRET, OpenIdProvider

pytestmark = pytest.mark.timeout(600)


@pytest.fixture(scope="module")
async def browser() -> AsyncIterator[Any]:
    async with running_browser() as browser:
        yield browser


async def test_a_person_signs_in_by_keyboard_and_is_led_back(stack: Stack, browser: Any, tmp_path: Path) -> None:
    """Once the key is revoked, an open page leads to signing in by itself."""
    keys, complaints = KeyFile(tmp_path / "keys.json"), list[str]()
    key = keys.add(SCOPES)
    gateway = stack.add("gateway", {"GATEWAY_ROLE": "api", "GATEWAY_API_KEYS_FILE": str(keys.path)})
    await gateway.start()
    await gateway.wait_ready()
    async with (
        running_front(stack, HTTP_GATEWAY=stack.address(gateway.name)) as front,
        new_page(browser, f"http://{front.address}", complaints) as page,
    ):
        await page.goto("/console/?model=x")
        await page.wait_for_url("**/console/signin?*")
        assert await findings(page) == []
        await page.focus("input[name=key]")
        await page.keyboard.type("llmk_wrong_key")
        await page.keyboard.press("Enter")
        await page.wait_for_selector("[role=alert]")
        # The browser reports the answer's status. That is no fault.
        assert ["401" in complaint for complaint in complaints] == [True]
        complaints.clear()
        await page.focus("input[name=key]")
        await page.keyboard.type(key)
        await page.keyboard.press("Enter")
        await page.wait_for_url("**/console/?model=x")
        assert await page.evaluate("document.cookie") == ""
        assert await findings(page) == []
        assert complaints == []
        await page.click("text=Sign out")
        await page.wait_for_url("**/console/signin")
        await page.fill("input[name=key]", key)
        await page.keyboard.press("Enter")
        await page.wait_for_selector("#jobs")
        keys.revoke(key)
        await page.wait_for_url("**/console/signin*")
        assert "has expired or was revoked" in await page.text_content("[role=alert]")
    await gateway.terminate()


async def test_a_person_signs_in_with_an_openid_provider(
    stack: Stack, stub: llm_pb2_grpc.LlmServiceStub, browser: Any, tmp_path: Path
) -> None:
    """The provider is another site to the browser, and the way back brings the cookie of the beginning.

    A page that follows a job outlives its token. The browser comes back with that of a renewed session.
    """
    workflow_id = (await stub.Submit(llm_pb2.SubmitRequest(job=new_job(model="idle")))).workflow_id
    secret, complaints = tmp_path / "client-secret", list[str]()
    secret.write_text(CLIENT_SECRET)
    provider = OpenIdProvider(life=20, refreshes=True)
    async with provider.serving():
        gateway = stack.add("gateway", {"GATEWAY_ROLE": "api", **provider.gateway})
        await gateway.start()
        await gateway.wait_ready()
        port = free_port()
        # To the browser the provider's 127.0.0.1 is another site.
        base = f"http://localhost:{port}"
        own = {
            "HTTP_PORT": str(port),
            "HTTP_GATEWAY": stack.address(gateway.name),
            "HTTP_PUBLIC_URL": base,
            "HTTP_OIDC_ISSUER": provider.url,
            "HTTP_OIDC_CLIENT_ID": CLIENT_ID,
            "HTTP_OIDC_CLIENT_SECRET_FILE": str(secret),
        }
        async with running_front(stack, **own), new_page(browser, base, complaints) as page:
            await page.goto("/console/models")
            await page.click("text=Sign in with 127.0.0.1")
            await page.wait_for_url(f"{base}/console/models")
            assert "ada@example.org" in await page.text_content("header")
            assert await page.evaluate("document.cookie") == ""
            await page.goto(f"/console/jobs/{workflow_id}")
            await page.evaluate("window.sameDocument = true")
            await page.wait_for_selector("#connection:has-text('expired')", state="attached")
            await page.wait_for_selector("#connection:has-text('live')", state="attached")
            assert await page.evaluate("window.sameDocument"), "the page was not loaded again"
            assert "refresh_token" in provider.granted
            complaints.clear()
            await page.click("text=Sign out")
            await page.wait_for_url("**/console/signin")
            await page.goto("/console/signin/oidc/callback?code=x&state=x")
            assert "start again" in await page.text_content("[role=alert]")
        await gateway.terminate()
    await stub.Cancel(llm_pb2.CancelRequest(workflow_id=workflow_id))
    assert ["400" in complaint for complaint in complaints] == [True]
