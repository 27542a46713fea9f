"""What the stack consists of: for each kind of process its command, environment and sign of readiness.

This is the one place that knows how the processes find each other.
"""

import os
import shutil
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from deploy.local.errors import ProgramMissing
from deploy.local.ports import HOST, Ports
from deploy.local.probes import has_search_attributes, is_ready, listens
from deploy.local.process import Probe
from jobs.names import SEARCH_ATTRIBUTES

_DYNAMIC_CONFIG: Final = {
    # One shard polls its queues 20 times a second by default, so that every step of a workflow may wait 50 ms.
    "history.transferProcessorMaxPollRPS": "2000",
    "history.timerProcessorMaxPollRPS": "2000",
    "history.visibilityProcessorMaxPollRPS": "2000",
    # A queue is spread over four partitions by default, for many servers. One server only forwards tasks between them,
    # and users take turns in each partition for itself.
    "matching.numTaskqueueReadPartitions": "1",
    "matching.numTaskqueueWritePartitions": "1",
    # A cancel reaches a running activity at once instead of with its next heartbeat.
    "system.enableCancelActivityWorkerCommand": "true",
    "frontend.WorkerCommandsEnabled": "true",
    # Users take turns: one user's thousand jobs must not starve another's one.
    "matching.enableFairness": "true",
    # How many jobs wait, in Temporal's metrics: once a minute by default.
    "matching.backlogMetricsEmitInterval": '"5s"',
    # Ids have 255 characters at most on PostgreSQL, whose columns take no more; without this SQLite takes 1000.
    "limit.maxIDLength": "255",
}


@dataclass(frozen=True)
class Wiring:
    """What a part needs to know about the others."""

    ports: Ports
    state_dir: Path
    engine: str

    @property
    def temporal(self) -> Mapping[str, str]:
        """Temporal's own environment variables. A profile in the user's configuration file must not add to them."""
        return {
            "TEMPORAL_ADDRESS": f"{HOST}:{self.ports.temporal}",
            "TEMPORAL_NAMESPACE": "default",
            "TEMPORAL_CONFIG_FILE": "/dev/null",
        }

    @property
    def feed(self) -> Mapping[str, str]:
        """Where the live feed is."""
        return {"FEED_URL": f"nats://{HOST}:{self.ports.nats}"}


@dataclass(frozen=True)
class Part:
    """How to run one kind of process."""

    command: tuple[str, ...]
    probe: Probe
    environment: Mapping[str, str] = field(default_factory=dict)
    """Takes precedence over the user's own environment."""


def _temporal(wiring: Wiring) -> Part:
    address = f"{HOST}:{wiring.ports.temporal}"
    attributes = {key.name: key.indexed_value_type.name.title().replace("_", "") for key in SEARCH_ATTRIBUTES}
    return Part(
        command=(
            _program("temporal"),
            *("server", "start-dev", "--ip", HOST),
            *("--port", str(wiring.ports.temporal), "--ui-port", str(wiring.ports.temporal_ui)),
            *("--metrics-port", str(wiring.ports.temporal_metrics)),
            *("--db-filename", str(wiring.state_dir / "temporal.db")),
            # Twice the throughput of the default rollback journal.
            *("--sqlite-pragma", "journal_mode=WAL", "--sqlite-pragma", "synchronous=NORMAL"),
            *("--ui-codec-endpoint", f"http://{HOST}:{wiring.ports.codec}", "--ui-disable-news-fetch"),
            *(word for name, kind in attributes.items() for word in ("--search-attribute", f"{name}={kind}")),
            *(word for key, value in _DYNAMIC_CONFIG.items() for word in ("--dynamic-config-value", f"{key}={value}")),
        ),
        probe=has_search_attributes(address, attributes),
    )


def _nats(wiring: Wiring) -> Part:
    return Part(
        command=(
            _program("nats-server"),
            *("-a", HOST, "-p", str(wiring.ports.nats), "-js", "-sd", str(wiring.state_dir / "nats")),
        ),
        probe=listens(f"{HOST}:{wiring.ports.nats}"),
    )


def _codec(wiring: Wiring) -> Part:
    return Part(
        command=(sys.executable, "-m", "services.codec"),
        environment={
            "CODEC_HOST": HOST,
            "CODEC_PORT": str(wiring.ports.codec),
            "CODEC_METRICS_HOST": HOST,
            "CODEC_METRICS_PORT": str(wiring.ports.codec_metrics),
            # The browser calls from the Web UI's page, under whichever name it was opened.
            "CODEC_ALLOWED_ORIGINS": ",".join(
                f"http://{host}:{wiring.ports.temporal_ui}" for host in (HOST, "localhost")
            ),
        },
        probe=is_ready(f"{HOST}:{wiring.ports.codec_metrics}"),
    )


def _gateway(wiring: Wiring) -> Part:
    return Part(
        command=(sys.executable, "-m", "services.gateway"),
        environment={
            **wiring.temporal,
            **wiring.feed,
            "GATEWAY_HOST": HOST,
            "GATEWAY_PORT": str(wiring.ports.gateway),
            # Whoever tries the stack has no proto file at hand.
            "GATEWAY_REFLECTION": os.environ.get("GATEWAY_REFLECTION", "true"),
            "GATEWAY_METRICS_HOST": HOST,
            "GATEWAY_METRICS_PORT": str(wiring.ports.gateway_metrics),
            "GATEWAY_NOTIFY_OPERATOR": os.environ.get("GATEWAY_NOTIFY_OPERATOR", _has_operators_endpoint()),
        },
        probe=is_ready(f"{HOST}:{wiring.ports.gateway_metrics}"),
    )


def _gpu_worker(wiring: Wiring) -> Part:
    return Part(
        command=(sys.executable, "-m", "services.gpu_worker"),
        environment={
            **wiring.temporal,
            **wiring.feed,
            "GPU_WORKER_ENGINE": wiring.engine,
            "GPU_WORKER_METRICS_HOST": HOST,
            "GPU_WORKER_METRICS_PORT": str(wiring.ports.gpu_worker_metrics),
        },
        probe=is_ready(f"{HOST}:{wiring.ports.gpu_worker_metrics}"),
    )


def _notifier(wiring: Wiring) -> Part:
    return Part(
        command=(sys.executable, "-m", "services.notifier"),
        environment={
            **wiring.temporal,
            "NOTIFIER_METRICS_HOST": HOST,
            "NOTIFIER_METRICS_PORT": str(wiring.ports.notifier_metrics),
            # Receivers are on this machine, too: any port, without TLS.
            "NOTIFIER_WEBHOOK_NETWORKS": '["127.0.0.0/8", "::1/128"]',
            "NOTIFIER_WEBHOOK_SCHEMES": '["https", "http"]',
            "NOTIFIER_WEBHOOK_PORTS": "[]",
        },
        probe=is_ready(f"{HOST}:{wiring.ports.notifier_metrics}"),
    )


PARTS: Final[dict[str, Callable[[Wiring], Part]]] = {
    "temporal": _temporal,
    "nats": _nats,
    "codec": _codec,
    "gateway": _gateway,
    "gpu-worker": _gpu_worker,
    "notifier": _notifier,
}
"""Every kind of process, in the order in which they start."""

LISTENERS: Final = {
    "temporal": ("temporal", "temporal_ui"),
    "nats": ("nats",),
    "codec": ("codec",),
    "gateway": ("gateway",),
}
"""The fields of Ports that a kind listens on, metrics apart; the first is its address."""

METRICS: Final = {
    "temporal": "temporal_metrics",
    "codec": "codec_metrics",
    "gateway": "gateway_metrics",
    "gpu-worker": "gpu_worker_metrics",
    "notifier": "notifier_metrics",
}
"""The field of Ports where a kind serves its metrics."""

SERVERS: Final = ("temporal", "nats")
"""The kinds that the others need to be ready before they start."""


def _has_operators_endpoint() -> str:
    """Return whether the notifier, which has this environment, too, has an endpoint for jobs that name no target."""
    return str(bool(os.environ.keys() & {"NOTIFIER_DEFAULT_WEBHOOK_URL", "NOTIFIER_USERS", "NOTIFIER_TENANTS"})).lower()


def _program(name: str) -> str:
    """Return the path of a program: the one that this environment brings, else the one on PATH."""
    found = shutil.which(name, path=str(Path(sys.executable).parent)) or shutil.which(name)
    if found is None:
        raise ProgramMissing(name)
    return found
