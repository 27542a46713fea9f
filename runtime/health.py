"""Whether a process lives and can do its work: asked over HTTP, by a container's probes and by people.

`/healthz` is 200 for as long as the process answers. `/readyz` is 200 while the process can do its work and 503 while
it cannot. Both answer with JSON that says what the process is and, `/readyz`, what is missing.

A thread serves them (see runtime.metrics) and asks the event loop, so that a process whose loop stands still is not
ready. It is alive all the same: a model's libraries may hold the loop for a minute while they load.
"""

import asyncio
import functools
import json
import subprocess
import sys
from collections.abc import Awaitable, Callable, Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from wsgiref.types import StartResponse, WSGIApplication, WSGIEnvironment

CHECK_TIMEOUT: Final = timedelta(seconds=2)
"""Maximum wait for what a check asks."""

_ANSWER_TIMEOUT: Final = timedelta(seconds=3)
"""Longer than a check takes: a loop that needs more stands still."""
_DISTRIBUTION: Final = "durable-llm-suite"
"""The name of this suite in pyproject.toml."""
_LIBRARIES: Final = {"temporalio": "temporalio", "grpcio": "grpc", "torch": "torch", "vllm": "vllm"}
"""Distributions whose versions matter, and their modules."""
_PATHS: Final = ("/healthz", "/readyz", "/metrics")

Check = Callable[[], bool | Awaitable[bool]]
"""Returns True while the process has what is checked. Called on the event loop."""


class Readiness:
    """What a process needs for its work. It is ready while serving() is open and every check succeeds."""

    def __init__(self, service: str) -> None:
        """Must be made on the event loop that the process runs on. `service` is the name of the process."""
        self._loop = asyncio.get_running_loop()
        self._about: dict[str, str] = {"service": service}
        self._needed: dict[str, tuple[str, Check]] = {}
        self._wanted: dict[str, tuple[str, Check]] = {}
        self._phase = "is starting"

    def describe(self, **about: str) -> None:
        """Add facts about the process to its answers. Never a secret: who can scrape metrics can read them."""
        self._about |= about

    def need(self, name: str, problem: str, check: Check) -> None:
        """Require the check for readiness; `problem` says, after the name, what is wrong when it fails."""
        self._needed[name] = problem, check

    def want(self, name: str, problem: str, check: Check) -> None:
        """Report a failing check as degraded: the process works without, and is ready."""
        self._wanted[name] = problem, check

    @contextmanager
    def serving(self) -> Iterator[None]:
        """Say that everything has started while the context is open, and afterwards that the process shuts down."""
        self._phase = ""
        try:
            yield
        finally:
            self._phase = "is shutting down"

    def healthz(self) -> dict[str, Any]:
        """Return what the process is. From any thread."""
        return {**self._about, "versions": versions()}

    def readyz(self) -> dict[str, Any]:
        """Return what the process is, whether it is `ready`, and what is missing or degraded. From any other thread."""
        looking = asyncio.run_coroutine_threadsafe(self._look(), self._loop)
        try:
            missing, degraded = looking.result(_ANSWER_TIMEOUT.total_seconds())
        except TimeoutError:
            looking.cancel()
            missing, degraded = {"process": f"has not answered within {_ANSWER_TIMEOUT.total_seconds():g} s"}, {}
        return {"ready": not missing, "missing": missing, "degraded": degraded, **self.healthz()}

    async def _look(self) -> tuple[dict[str, str], dict[str, str]]:
        missing, degraded = await asyncio.gather(_failing(self._needed), _failing(self._wanted))
        if self._phase:
            missing = {"process": self._phase, **missing}
        return missing, degraded


def with_health(metrics: "WSGIApplication", readiness: Readiness) -> "WSGIApplication":
    """Return the application that serves health and, at /metrics, the metrics. Other paths do not exist.

    A probe with a misspelt path must not find the metrics there and take them for health.
    """

    def application(environ: "WSGIEnvironment", start_response: "StartResponse") -> Iterable[bytes]:
        answer = respond(environ, start_response)
        # What follows the headers of an answer to HEAD, a client takes for the start of another answer.
        return [] if environ["REQUEST_METHOD"] == "HEAD" else answer

    def respond(environ: "WSGIEnvironment", start_response: "StartResponse") -> Iterable[bytes]:
        path = environ["PATH_INFO"]
        if path == "/metrics":
            return metrics(environ, start_response)
        if path not in _PATHS:
            return _answer(start_response, "404 Not Found", {"paths": _PATHS})
        if environ["REQUEST_METHOD"] not in ("GET", "HEAD"):
            return _answer(start_response, "405 Method Not Allowed", {}, ("Allow", "GET, HEAD"))
        if path == "/healthz":
            return _answer(start_response, "200 OK", readiness.healthz())
        found = readiness.readyz()
        return _answer(start_response, "200 OK" if found["ready"] else "503 Service Unavailable", found)

    return application


@functools.cache
def _own_version() -> str:
    """Return the version of the package that this code was installed as, else what git says of the checkout."""
    try:
        installed = metadata.distribution(_DISTRIBUTION)
        if Path(str(installed.locate_file("runtime/health.py"))).resolve() == Path(__file__).resolve():
            return installed.version
    except metadata.PackageNotFoundError:
        pass
    command = ("git", "-C", str(Path(__file__).parent), "describe", "--tags", "--always")
    try:
        return subprocess.run(command, capture_output=True, check=True, text=True, timeout=5).stdout.strip()  # noqa: S603
    except (OSError, subprocess.SubprocessError):
        return "unknown"


def versions() -> dict[str, str]:
    """Return the versions of this suite, of Python, and of those libraries that the process has loaded."""
    loaded = {name: metadata.version(name) for name, module in _LIBRARIES.items() if module in sys.modules}
    return {_DISTRIBUTION: _own_version(), "python": sys.version.partition(" ")[0], **loaded}


async def _failing(checks: dict[str, tuple[str, Check]]) -> dict[str, str]:
    """Return the names of the checks that fail, and their problems."""
    results = await asyncio.gather(*(_succeeds(check) for _, check in checks.values()))
    return {name: problem for (name, (problem, _)), good in zip(checks.items(), results, strict=True) if not good}


async def _succeeds(check: Check) -> bool:
    result = check()
    return result if isinstance(result, bool) else await result


def _answer(
    start_response: "StartResponse", status: str, body: dict[str, Any], *headers: tuple[str, str]
) -> Iterable[bytes]:
    data = json.dumps(body, indent=2).encode() + b"\n"
    about = [("Content-Type", "application/json"), ("Content-Length", str(len(data))), ("Cache-Control", "no-store")]
    start_response(status, [*about, *headers])
    return [data]
