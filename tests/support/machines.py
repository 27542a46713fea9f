"""The suite on several machines: each process on a host of its own in a tests.support.network."""

import asyncio
import os
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Final

from deploy.local.ports import HOST, Ports, choose_ports
from deploy.local.probes import has_search_attributes, is_ready, listens
from deploy.local.process import Probe, Process
from deploy.local.process_specs import LISTENERS, METRICS, PROCESS_SPECS, STORE, Wiring
from deploy.local.settings import StackSettings
from jobs.names import SEARCH_ATTRIBUTES
from tests.support.network import Host, Network
from tests.support.paths import ROOT


class Machines:
    """The processes by name: that of the host on which each runs."""

    def __init__(self, network: Network, folder: Path, environment: Mapping[str, Mapping[str, str]]) -> None:
        """`environment` holds extra variables by kind of process."""
        self.network = network
        self._folder = folder
        self._environment = environment
        # Hosts share no ports, so every process listens where its documentation says.
        self._ports: Final[Ports] = choose_ports(StackSettings())
        self.processes: Final[dict[str, Process]] = {}

    def host(self, name: str) -> Host:
        return self.network.hosts[name]

    def address(self, name: str, kind: str) -> str:
        """Return where the process of the host listens, as host:port."""
        return f"{self.host(name).address}:{getattr(self._ports, LISTENERS[kind][0])}"

    async def add(
        self, kind: str, name: str = "", environment: Mapping[str, str] | None = None, words: tuple[str, ...] = ()
    ) -> Process:
        """Define a process of a kind on a host, a new one if there is none, and return it without starting it.

        `words` are more arguments of its command.
        """
        name = name or kind
        host = self.network.hosts.get(name) or await self.network.host(name)
        folder = self._folder / name
        folder.mkdir()
        spec = PROCESS_SPECS[kind](Wiring(self._ports, folder, "simulated", {}))
        prefix = kind.upper().replace("-", "_")
        everywhere = {f"{prefix}_METRICS_HOST": host.address, f"{prefix}_METRICS_ALLOW_ANONYMOUS": "true"}
        if kind == "gateway":
            everywhere |= {"GATEWAY_HOST": host.address, "GATEWAY_ALLOW_ANONYMOUS": "true"}
        if kind not in ("temporal", "nats"):
            everywhere |= {
                "TEMPORAL_ADDRESS": self.address("temporal", "temporal"),
                "STORE_URL": (self._folder / STORE).as_uri(),
            }
            if "nats" in self.network.hosts:
                everywhere["FEED_URL"] = f"nats://{self.address('nats', 'nats')}"
        inherited = {key: value for key, value in os.environ.items() if not key.startswith("TEMPORAL_")}
        extra = {**self._environment.get(kind, {}), **(environment or {})}
        # The parts of Temporal find each other on loopback, so it listens on all addresses.
        own = "0.0.0.0" if kind == "temporal" else host.address
        process = self.processes[name] = Process(
            name,
            host.command(*(own if word == HOST else word for word in spec.command), *words),
            {**spec.defaults, **inherited, **spec.environment, **everywhere, **extra},
            log_path=self._folder / "logs" / f"{name}.log",
            probe=self._probe(kind, host),
            working_dir=ROOT,
            start_timeout=180,
            stop_grace=15,
        )
        return process

    def _probe(self, kind: str, host: Host) -> Probe:
        if kind == "temporal":
            return has_search_attributes(self.address(host.name, kind), [key.name for key in SEARCH_ATTRIBUTES])
        if kind == "nats":
            return listens(self.address(host.name, kind))
        return is_ready(f"{host.address}:{getattr(self._ports, METRICS[kind])}")

    async def start(self, *names: str) -> None:
        """Start the processes of these hosts, or all that do not run, and return once they are ready."""
        waiting = [process for name, process in self.processes.items() if not names or name in names]
        for process in waiting:
            if not process.running:
                await process.start()
        for process in waiting:
            await process.wait_ready()

    async def stop(self) -> None:
        for name in self.network.hosts:
            await self.host(name).link.heal()
        await asyncio.gather(*(process.kill() for process in self.processes.values()))


@asynccontextmanager
async def machines(
    network: Network, folder: Path, environment: Mapping[str, Mapping[str, str]]
) -> AsyncIterator[Machines]:
    """Yield machines without a process; whatever is added is killed at the end."""
    made = Machines(network, folder, environment)
    try:
        yield made
    finally:
        await made.stop()
