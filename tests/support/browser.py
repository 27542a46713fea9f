"""A real browser: the chromium that the system has, driven by playwright."""

import asyncio
import shutil
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Any, Final

import pytest

from tests.support.paths import ROOT

_PROGRAMS: Final = ("chromium", "chromium-browser", "google-chrome")
AXE: Final = ROOT / "tests" / "axe" / "node_modules" / "axe-core" / "axe.min.js"
SIZES: Final[Mapping[str, Any]] = {"desktop": {"width": 1180, "height": 800}, "phone": {"width": 360, "height": 740}}
PATIENCE: Final = 120_000
"""How long a page may take for what a test waits for, in milliseconds: the machine may be busy."""
_REPORT: Final = """
document.addEventListener("securitypolicyviolation", (event) =>
    console.error(`the policy refuses ${event.blockedURI} (${event.violatedDirective})`));
"""


@asynccontextmanager
async def running_browser() -> AsyncIterator[Any]:
    """Run a browser while the context is open. Skips the test without one."""
    playwright = pytest.importorskip("playwright.async_api")
    program = next(filter(None, map(shutil.which, _PROGRAMS)), None)
    if program is None:
        pytest.skip("no chromium is installed")
    async with playwright.async_playwright() as driver:
        browser = await driver.chromium.launch(executable_path=program, args=["--no-sandbox"])
        try:
            yield browser
        finally:
            await browser.close()


@asynccontextmanager
async def new_page(browser: Any, base: str, complaints: list[str], **options: Any) -> AsyncIterator[Any]:
    """Open a page while the context is open. What the browser's console complains of is added to `complaints`."""
    context = await browser.new_context(base_url=base, **{"viewport": SIZES["desktop"], **options})
    context.set_default_timeout(PATIENCE)
    await context.add_init_script(_REPORT)
    page = await context.new_page()

    def hear(message: Any) -> None:
        if message.type in ("error", "warning"):
            complaints.append(f"{message.type}: {message.text} ({page.url})")

    page.on("console", hear)
    page.on("pageerror", lambda error: complaints.append(f"{error} ({page.url})"))
    try:
        yield page
    finally:
        await context.close()


async def until(page: Any, expression: str) -> Any:
    """Return the value of an expression of JavaScript once it is true. It polls: the policy of a page refuses to
    evaluate texts, except for the debugger.
    """
    async with asyncio.timeout(PATIENCE / 1000):
        while not (value := await page.evaluate(expression)):  # noqa: ASYNC110
            await asyncio.sleep(0.05)
    return value


async def findings(page: Any) -> list[str]:
    """Return what axe finds on a page that is serious or critical."""
    if not AXE.exists():
        pytest.skip("axe-core is not installed: make test installs it where npm is")
    if not await page.evaluate("'axe' in window"):
        # Evaluated by the debugger, which the page's policy does not bind.
        await page.evaluate(AXE.read_text())
    result = await page.evaluate("axe.run({resultTypes: ['violations']})")
    return [
        f"{found['id']}: {found['help']}: {[node['html'][:200] for node in found['nodes']]}"
        for found in result["violations"]
        if found["impact"] in ("serious", "critical")
    ]
