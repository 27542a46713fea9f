"""The stack as a library: its processes, their addresses, their start and stop.

    async with Stack(StackSettings(state_dir=folder, temporal_port=0, ...), only=("temporal", "nats")) as stack:
        address = stack.address("temporal")
        await stack.processes["nats"].kill()

A process that ends is not restarted: `supervisor` does that.
"""

import fcntl
import importlib.util
import os
import signal
import stat
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import IO, TYPE_CHECKING, Final, Self

from deploy.local import session_keys
from deploy.local.errors import EngineMissing, StateBusy, StateShared
from deploy.local.ports import HOST, choose_ports, free_port, require_free
from deploy.local.process import Process
from deploy.local.process_specs import LISTENERS, METRICS, OPTIONAL, PROCESS_SPECS, SERVERS, STORE, Wiring
from deploy.local.settings import StackSettings

if TYPE_CHECKING:
    from deploy.local.secrets import Secrets

_ROOT: Final = Path(__file__).parents[2]
_LOCK: Final = "lock"
_TEMPORAL: Final = {f"temporal.db{end}" for end in ("", "-shm", "-wal", "-journal")}
_KEPT: Final = {_LOCK, "logs", "nats", "tls", STORE, session_keys.NAME, *_TEMPORAL}
"""Names of the entries of a state folder."""

Report = Callable[[str, str], None]
"""A callback that gets the name of a process and a few words about its state."""


class Stack:
    """The processes of one state folder. Entering the context starts them. Leaving it stops them and those of add().

    Entering raises PortTaken, StateBusy or StateShared before any process is started. It raises ProcessFailed, after
    all are stopped again, if a process does not become ready.
    """

    def __init__(
        self,
        settings: StackSettings,
        *,
        only: Collection[str] = tuple(PROCESS_SPECS.keys() - OPTIONAL),
        environment: Mapping[str, Mapping[str, str]] | None = None,
        report: Report = lambda name, words: None,
    ) -> None:
        """Define the processes. Raises ProgramMissing, and EngineMissing if a GPU worker's engine is not installed.

        `only` names the kinds that run: keys of PROCESS_SPECS. `environment` holds extra variables by kind. `report` is
        called with each change of a process.
        """
        self._settings = settings
        self._extra = environment or {}
        self._report = report
        self.state_dir: Final = settings.state_dir.absolute()
        self.ports: Final = choose_ports(settings)
        """Ports of the first process of each kind, also of a kind that does not run. address() knows those of all."""
        self._secrets = _new_secrets(self.state_dir / "tls") if settings.tls else None
        self.processes: Final[dict[str, Process]] = {}
        """Processes by name: the kind, and "kind-2", "kind-3" for further ones of a kind."""
        self._addresses: dict[str, str] = {}
        self._metrics_addresses: dict[str, str] = {}
        self._lock: IO[str] | None = None
        if "gpu-worker" in only:
            _require_engine(settings.engine)
        for kind in sorted(only, key=list(PROCESS_SPECS).index):
            for _ in range(settings.gpu_workers if kind == "gpu-worker" else 1):
                self.add(kind)

    @property
    def web_ui(self) -> str:
        """The URL of Temporal's Web UI."""
        return f"http://{HOST}:{self.ports.temporal_ui}"

    def address(self, name: str) -> str:
        """Return the address of a process as "host:port". Raises KeyError if it does not listen."""
        return self._addresses[name]

    def metrics_url(self, name: str) -> str:
        """Return the URL of a process's metrics. Raises KeyError if it has none."""
        scheme = "http" if self._secrets is None or name == "temporal" else "https"
        return f"{scheme}://{self._metrics_addresses[name]}/metrics"

    @property
    def ca(self) -> Path | None:
        """The file of the CA's certificate, once the stack has started. None: the stack has no TLS."""
        return self._secrets.ca if self._secrets is not None else None

    def add(self, kind: str, environment: Mapping[str, str] | None = None, *, working_dir: Path = _ROOT) -> Process:
        """Define one more process of a kind, and return it without starting it. A second one listens on a free port.

        A service runs the code in its `working_dir`: this checkout or another one.
        """
        number = 1
        while (name := kind if number == 1 else f"{kind}-{number}") in self.processes:
            number += 1
        listens = LISTENERS.get(kind, ())
        own = _ports_of(kind)
        ports = self.ports if number == 1 else replace(self.ports, **{field: free_port() for field in own})
        notifiers = {**_inherited_environment(), **self._extra.get("notifier", {})}
        spec = PROCESS_SPECS[kind](Wiring(ports, self.state_dir, self._settings.engine, notifiers, self._secrets))
        process = Process(
            name,
            spec.command,
            {
                **spec.defaults,
                **_inherited_environment(),
                **spec.environment,
                **self._extra.get(kind, {}),
                **(environment or {}),
            },
            log_path=self.state_dir / "logs" / f"{name}.log",
            probe=spec.probe,
            working_dir=working_dir,
            start_timeout=self._settings.start_timeout,
            stop_grace=self._settings.stop_grace,
        )
        self.processes[name] = process
        if listens:
            self._addresses[name] = f"{HOST}:{getattr(ports, listens[0])}"
        if kind in METRICS:
            self._metrics_addresses[name] = f"{HOST}:{getattr(ports, METRICS[kind])}"
        return process

    async def __aenter__(self) -> Self:
        """Start the servers, then all services concurrently. Return once all are ready."""
        self._lock = _lock(self.state_dir)
        try:
            for kind in PROCESS_SPECS.keys() & self.processes.keys():
                for field in _ports_of(kind):
                    require_free(getattr(self.ports, field), field)
            session_keys.write_session_key(self.state_dir)
            if self._secrets is not None:
                self._secrets.write()
            servers = [process for name, process in self.processes.items() if name in SERVERS]
            services = [process for name, process in self.processes.items() if name not in SERVERS]
            await self._start(servers)
            await self._start(services, servers)
        except BaseException:
            await self._stop()
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        """Stop all processes in the reverse order of their start."""
        await self._stop()

    def hurry(self) -> None:
        """Kill the processes that still run, so that a stop under way ends immediately."""
        for process in self.processes.values():
            process.signal(signal.SIGKILL)

    async def _start(self, processes: Collection[Process], servers: Collection[Process] = ()) -> None:
        since = time.monotonic()
        for process in processes:
            await process.start()
        for process in processes:
            await process.wait_ready(beside=[*servers, *processes])
            words = f"ready after {time.monotonic() - since:.1f} s"
            address = self._addresses.get(process.name)
            self._report(process.name, f"{words} on {address}" if address else words)

    async def _stop(self) -> None:
        for process in reversed(self.processes.values()):
            if process.running:
                await process.terminate()
                self._report(process.name, "stopped")
        if self._lock is not None:
            self._lock.close()
            self._lock = None


def _new_secrets(folder: Path) -> "Secrets":
    """Return the secrets of a stack. The import is here because only TLS needs the packages that create them."""
    from deploy.local.secrets import Secrets

    return Secrets(folder)


def _require_engine(engine: str) -> None:
    """Raise EngineMissing if the engine's package is not installed. Importing the package would take seconds."""
    if engine != "simulated" and importlib.util.find_spec(engine) is None:
        raise EngineMissing(engine)


def _ports_of(kind: str) -> tuple[str, ...]:
    """Return the fields of Ports that a kind listens on."""
    metrics = METRICS.get(kind)
    return (*LISTENERS.get(kind, ()), *([metrics] if metrics else []))


def _lock(state_dir: Path) -> IO[str]:
    """Lock the state folder for this process until the file is closed, also by the death of the process."""
    _make_private(state_dir)
    lock = (state_dir / _LOCK).open("w")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        lock.close()
        raise StateBusy(state_dir) from error
    return lock


def _make_private(state_dir: Path) -> None:
    """Create the state folder for its owner alone, because it holds prompts, outputs and URLs of webhooks.

    Raises StateShared for an existing folder that others can access and that is not the folder of a stack.
    """
    try:
        state_dir.mkdir(mode=stat.S_IRWXU, parents=True)
    except FileExistsError:
        if not state_dir.stat().st_mode & (stat.S_IRWXG | stat.S_IRWXO):
            return
        # Earlier versions created the folder with this mode.
        kept = {path.name for path in state_dir.iterdir()}
        if not (_LOCK in kept and kept <= _KEPT):
            raise StateShared(state_dir) from None
        state_dir.chmod(stat.S_IRWXU)


def _inherited_environment() -> dict[str, str]:
    """Return the environment of this process without variables that would connect a service to another Temporal."""
    ignored = ignored_variables()
    return {name: value for name, value in os.environ.items() if name not in ignored}


def ignored_variables() -> list[str]:
    """Return the names of this process's variables that its services do not get."""
    return sorted(name for name in os.environ if name.startswith("TEMPORAL_"))
