"""The stack as a library: which processes there are, where they listen, and their start and stop.

    async with Stack(StackSettings(state_dir=folder, temporal_port=0, ...), only=("temporal", "nats")) as stack:
        address = stack.address("temporal")
        await stack.processes["nats"].kill()

Nothing here restarts a process that ends: see `supervisor` for that.
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
from typing import IO, Final, Self

from deploy.local.errors import EngineMissing, StateBusy, StateShared
from deploy.local.ports import HOST, choose_ports, free_port, require_free
from deploy.local.process import Process
from deploy.local.process_specs import LISTENERS, METRICS, PROCESS_SPECS, SERVERS, Wiring
from deploy.local.settings import StackSettings

_ROOT: Final = Path(__file__).parents[2]
_LOCK: Final = "lock"
_KEPT: Final = {_LOCK, "logs", "nats", *(f"temporal.db{end}" for end in ("", "-shm", "-wal", "-journal"))}
"""All that a state folder holds."""

Report = Callable[[str, str], None]
"""Takes the name of a process and a few words on how it is."""


class Stack:
    """The processes of one state folder. Entering starts them, leaving stops them and what add() brought.

    Entering raises PortTaken, StateBusy or StateShared before anything is started, and ProcessFailed, with all stopped
    again, when a process does not get ready.
    """

    def __init__(
        self,
        settings: StackSettings,
        *,
        only: Collection[str] = tuple(PROCESS_SPECS),
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
        """Where everything listens, or would. For what add() brings see address()."""
        self.processes: Final[dict[str, Process]] = {}
        """By name: the kind, and for the second and later of a kind "kind-2", "kind-3"."""
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
        """Return "host:port" of a process that listens; raises KeyError for any other."""
        return self._addresses[name]

    def metrics_url(self, name: str) -> str:
        """Return where a process serves its metrics; raises KeyError for one that has none."""
        return f"http://{self._metrics_addresses[name]}/metrics"

    def add(self, kind: str, environment: Mapping[str, str] | None = None, *, working_dir: Path = _ROOT) -> Process:
        """Define one more process of a kind and return it, not yet started. A second one listens on a free port.

        A service runs the code of its `working_dir`: this checkout or another one.
        """
        number = 1
        while (name := kind if number == 1 else f"{kind}-{number}") in self.processes:
            number += 1
        listens = LISTENERS.get(kind, ())
        own = _ports_of(kind)
        ports = self.ports if number == 1 else replace(self.ports, **{field: free_port() for field in own})
        notifiers = {**_inherited_environment(), **self._extra.get("notifier", {})}
        spec = PROCESS_SPECS[kind](Wiring(ports, self.state_dir, self._settings.engine, notifiers))
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
        """Start the servers, then the services side by side; return once all are ready."""
        self._lock = _lock(self.state_dir)
        try:
            for kind in PROCESS_SPECS.keys() & self.processes.keys():
                for field in _ports_of(kind):
                    require_free(getattr(self.ports, field), field)
            servers = [process for name, process in self.processes.items() if name in SERVERS]
            services = [process for name, process in self.processes.items() if name not in SERVERS]
            await self._start(servers)
            await self._start(services)
        except BaseException:
            await self._stop()
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        """Stop all processes, the last one first."""
        await self._stop()

    def hurry(self) -> None:
        """Kill what still runs, so that a stop under way ends at once."""
        for process in self.processes.values():
            process.signal(signal.SIGKILL)

    async def _start(self, processes: Collection[Process]) -> None:
        since = time.monotonic()
        for process in processes:
            await process.start()
        for process in processes:
            await process.wait_ready()
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


def _require_engine(engine: str) -> None:
    """Raise EngineMissing where the engine's package is not installed; it is not imported, which takes seconds."""
    if engine != "simulated" and importlib.util.find_spec(engine) is None:
        raise EngineMissing(engine)


def _ports_of(kind: str) -> tuple[str, ...]:
    """Return the fields of Ports that a kind takes."""
    metrics = METRICS.get(kind)
    return (*LISTENERS.get(kind, ()), *([metrics] if metrics else []))


def _lock(state_dir: Path) -> IO[str]:
    """Take the state folder for this process: held until the file is closed, also by the process's death."""
    _make_private(state_dir)
    lock = (state_dir / _LOCK).open("w")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        lock.close()
        raise StateBusy(state_dir) from error
    return lock


def _make_private(state_dir: Path) -> None:
    """Make the state folder, for its owner alone: prompts, outputs and the webhooks' URLs are in it.

    Raises StateShared for a folder that is there already, open to others and not a stack's.
    """
    try:
        state_dir.mkdir(mode=stat.S_IRWXU, parents=True)
    except FileExistsError:
        if not state_dir.stat().st_mode & (stat.S_IRWXG | stat.S_IRWXO):
            return
        # As an earlier version made it.
        kept = {path.name for path in state_dir.iterdir()}
        if not (_LOCK in kept and kept <= _KEPT):
            raise StateShared(state_dir) from None
        state_dir.chmod(stat.S_IRWXU)


def _inherited_environment() -> dict[str, str]:
    """Return this process's environment without the variables that would lead a service to another Temporal."""
    return {name: value for name, value in os.environ.items() if not name.startswith("TEMPORAL_")}
