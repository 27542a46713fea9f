"""The processes of the stack: command, environment and readiness probe of each kind.

Only this module knows the addresses by which the processes find each other.
"""

import json
import shutil
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Final

from deploy.local import session_keys
from deploy.local.errors import ProgramMissing
from deploy.local.ports import HOST, Ports
from deploy.local.probes import has_search_attributes, is_ready, listens
from deploy.local.process import Probe
from jobs.names import SEARCH_ATTRIBUTES

if TYPE_CHECKING:
    from deploy.local.secrets import Secrets

_NATS_CONFIG: Final = Path(__file__).parents[1] / "nats" / "nats-server.conf"

_DYNAMIC_CONFIG: Final = {
    # One shard polls its queues 20 times a second by default, so that every step of a workflow may wait 50 ms.
    "history.transferProcessorMaxPollRPS": "2000",
    "history.timerProcessorMaxPollRPS": "2000",
    "history.visibilityProcessorMaxPollRPS": "2000",
    # A workflow is deleted when the queues have noted that its last tasks are done: every 30 s by default.
    "history.transferProcessorUpdateAckInterval": '"1s"',
    "history.visibilityProcessorUpdateAckInterval": '"1s"',
    # By default the end of a workflow, written late, puts a deleted one back into the lists.
    "history.visibilityProcessorEnsureCloseBeforeDelete": "true",
    # A queue is spread over four partitions by default, for many servers. One server only forwards tasks between them,
    # and users take turns in each partition for itself.
    "matching.numTaskqueueReadPartitions": "1",
    "matching.numTaskqueueWritePartitions": "1",
    # A cancel reaches a running activity at once instead of with its next heartbeat.
    "system.enableCancelActivityWorkerCommand": "true",
    "frontend.WorkerCommandsEnabled": "true",
    # Users take turns: one user's thousand jobs must not starve another's one.
    "matching.enableFairness": "true",
    # Temporal reports the number of waiting jobs once a minute by default.
    "matching.backlogMetricsEmitInterval": '"5s"',
    # A worker whose host was lost leaves its polls behind, to which Temporal gives jobs until it notices:
    # after 70 s by default, in which a job may lose two attempts.
    "frontend.keepAliveTime": '"10s"',
    "frontend.keepAliveTimeout": '"5s"',
    # Ids have 255 characters at most on PostgreSQL, whose columns take no more; without this SQLite takes 1000.
    "limit.maxIDLength": "255",
}


@dataclass(frozen=True)
class Wiring:
    """The facts about the stack that the commands and environments depend on."""

    ports: Ports
    state_dir: Path
    engine: str
    notifier_environment: Mapping[str, str]
    """Environment of the notifiers, what they inherit included."""
    secrets: "Secrets | None" = None
    """None: nothing uses TLS."""

    @property
    def temporal(self) -> Mapping[str, str]:
        """Temporal's own environment variables. A profile in the user's configuration file must not add to them."""
        return {
            "TEMPORAL_ADDRESS": f"{HOST}:{self.ports.temporal}",
            "TEMPORAL_NAMESPACE": "default",
            "TEMPORAL_CONFIG_FILE": "/dev/null",
        }

    @property
    def ca(self) -> Path | None:
        """The file of the CA's certificate. None: nothing uses TLS."""
        return self.secrets.ca if self.secrets is not None else None

    @property
    def codec_url(self) -> str:
        """The URL of the codec server."""
        return f"{'http' if self.secrets is None else 'https'}://{HOST}:{self.ports.codec}"

    def feed(self, role: str) -> Mapping[str, str]:
        """Return the settings with which a role connects to the live feed."""
        client = self.secrets.nats_client(role, "FEED_") if self.secrets is not None else {}
        return {"FEED_URL": f"nats://{HOST}:{self.ports.nats}", **client}

    def tls(self, kind: str, *prefixes: str) -> Mapping[str, str]:
        """Return the TLS settings of a kind of process, for the listeners whose settings begin with the prefixes."""
        if self.secrets is None:
            return {}
        return {name: path for prefix in prefixes for name, path in self.secrets.server(kind, prefix).items()}


@dataclass(frozen=True)
class ProcessSpec:
    """Command, environment and probe of one kind of process."""

    command: tuple[str, ...]
    probe: Probe
    environment: Mapping[str, str] = field(default_factory=dict)
    """Takes precedence over the user's own environment."""
    defaults: Mapping[str, str] = field(default_factory=dict)
    """The user's own environment takes precedence over it."""


def _temporal(wiring: Wiring) -> ProcessSpec:
    address = f"{HOST}:{wiring.ports.temporal}"
    attributes = {key.name: key.indexed_value_type.name.title().replace("_", "") for key in SEARCH_ATTRIBUTES}
    return ProcessSpec(
        command=(
            program("temporal"),
            *("server", "start-dev", "--ip", HOST),
            *("--port", str(wiring.ports.temporal), "--ui-port", str(wiring.ports.temporal_ui)),
            *("--metrics-port", str(wiring.ports.temporal_metrics)),
            *("--db-filename", str(wiring.state_dir / "temporal.db")),
            # Twice the throughput of the default rollback journal.
            *("--sqlite-pragma", "journal_mode=WAL", "--sqlite-pragma", "synchronous=NORMAL"),
            *("--ui-codec-endpoint", wiring.codec_url, "--ui-disable-news-fetch"),
            *(word for name, kind in attributes.items() for word in ("--search-attribute", f"{name}={kind}")),
            *(word for key, value in _DYNAMIC_CONFIG.items() for word in ("--dynamic-config-value", f"{key}={value}")),
        ),
        probe=has_search_attributes(address, attributes),
    )


def _nats(wiring: Wiring) -> ProcessSpec:
    store = str(wiring.state_dir / "nats")
    if wiring.secrets is None:
        options: tuple[str, ...] = ("-js", "-sd", store)
        environment: Mapping[str, str] = {}
    else:
        options = ("-c", str(_NATS_CONFIG))
        paths = {**wiring.tls("nats", "NATS_TLS_"), "NATS_STORE_DIR": store}
        # nats-server parses variables like its file, where a space ends a word.
        quoted = {name: json.dumps(path) for name, path in paths.items()}
        environment = {**quoted, **wiring.secrets.nats_public_keys()}
    return ProcessSpec(
        command=(program("nats-server"), "-a", HOST, "-p", str(wiring.ports.nats), *options),
        environment=environment,
        probe=listens(f"{HOST}:{wiring.ports.nats}"),
    )


def _codec(wiring: Wiring) -> ProcessSpec:
    return ProcessSpec(
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
            **wiring.tls("codec", "CODEC_TLS_", "CODEC_METRICS_TLS_"),
        },
        probe=is_ready(f"{HOST}:{wiring.ports.codec_metrics}", wiring.ca),
    )


def _gateway(wiring: Wiring) -> ProcessSpec:
    return ProcessSpec(
        command=(sys.executable, "-m", "services.gateway"),
        environment={
            **wiring.temporal,
            **wiring.feed("gateway"),
            **wiring.tls("gateway", "GATEWAY_TLS_", "GATEWAY_METRICS_TLS_"),
            "GATEWAY_HOST": HOST,
            "GATEWAY_PORT": str(wiring.ports.gateway),
            "GATEWAY_METRICS_HOST": HOST,
            "GATEWAY_METRICS_PORT": str(wiring.ports.gateway_metrics),
        },
        defaults={
            # A newcomer to the stack has no proto file for grpcurl.
            "GATEWAY_REFLECTION": "true",
            "STORE_URL": (wiring.state_dir / STORE).as_uri(),
            # A stack whose notifier has an endpoint for jobs that name no target uses it.
            **({"GATEWAY_NOTIFY_OPERATOR": "true"} if _has_operators_endpoint(wiring) else {}),
        },
        probe=is_ready(f"{HOST}:{wiring.ports.gateway_metrics}", wiring.ca),
    )


def _gpu_worker(wiring: Wiring) -> ProcessSpec:
    return ProcessSpec(
        command=(sys.executable, "-m", "services.gpu_worker"),
        environment={
            **wiring.temporal,
            **wiring.feed("gpu-worker"),
            **wiring.tls("gpu-worker", "GPU_WORKER_METRICS_TLS_"),
            "GPU_WORKER_ENGINE": wiring.engine,
            "GPU_WORKER_METRICS_HOST": HOST,
            "GPU_WORKER_METRICS_PORT": str(wiring.ports.gpu_worker_metrics),
        },
        defaults={"STORE_URL": (wiring.state_dir / STORE).as_uri()},
        probe=is_ready(f"{HOST}:{wiring.ports.gpu_worker_metrics}", wiring.ca),
    )


def _notifier(wiring: Wiring) -> ProcessSpec:
    return ProcessSpec(
        command=(sys.executable, "-m", "services.notifier"),
        environment={
            **wiring.temporal,
            **wiring.tls("notifier", "NOTIFIER_METRICS_TLS_"),
            **(wiring.secrets.nats_client("notifier", "NOTIFIER_NATS_") if wiring.secrets is not None else {}),
            "NOTIFIER_METRICS_HOST": HOST,
            "NOTIFIER_METRICS_PORT": str(wiring.ports.notifier_metrics),
            # Receivers are on this machine, too: any port, without TLS.
            "NOTIFIER_WEBHOOK_NETWORKS": '["127.0.0.0/8", "::1/128"]',
            "NOTIFIER_WEBHOOK_SCHEMES": '["https", "http"]',
            "NOTIFIER_WEBHOOK_PORTS": "[]",
        },
        probe=is_ready(f"{HOST}:{wiring.ports.notifier_metrics}", wiring.ca),
    )


def _trainer(wiring: Wiring) -> ProcessSpec:
    return ProcessSpec(
        command=(sys.executable, "-m", "services.trainer"),
        environment={
            **wiring.temporal,
            **wiring.tls("trainer", "TRAINER_METRICS_TLS_"),
            "TRAINER_METRICS_HOST": HOST,
            "TRAINER_METRICS_PORT": str(wiring.ports.trainer_metrics),
        },
        defaults={"STORE_URL": (wiring.state_dir / STORE).as_uri()},
        probe=is_ready(f"{HOST}:{wiring.ports.trainer_metrics}", wiring.ca),
    )


def _http(wiring: Wiring) -> ProcessSpec:
    return ProcessSpec(
        command=(sys.executable, "-m", "services.http"),
        environment={
            **({} if wiring.ca is None else {"HTTP_GATEWAY_TLS_CA": str(wiring.ca)}),
            **wiring.tls("http", "HTTP_TLS_", "HTTP_METRICS_TLS_"),
            "HTTP_HOST": HOST,
            "HTTP_PORT": str(wiring.ports.http),
            "HTTP_METRICS_HOST": HOST,
            "HTTP_METRICS_PORT": str(wiring.ports.http_metrics),
            "HTTP_GATEWAY": f"{HOST}:{wiring.ports.gateway}",
        },
        defaults={
            "HTTP_SESSION_KEY_FILE": str(wiring.state_dir / session_keys.NAME),
            "HTTP_CONSOLE_TEMPORAL_URL": f"http://{HOST}:{wiring.ports.temporal_ui}"
            "/namespaces/default/workflows/{workflow_id}/{run_id}",
        },
        probe=is_ready(f"{HOST}:{wiring.ports.http_metrics}", wiring.ca),
    )


PROCESS_SPECS: Final[dict[str, Callable[[Wiring], ProcessSpec]]] = {
    "temporal": _temporal,
    "nats": _nats,
    "codec": _codec,
    "gateway": _gateway,
    "gpu-worker": _gpu_worker,
    "notifier": _notifier,
    "trainer": _trainer,
    "http": _http,
}
"""Every kind of process, in the order in which they start."""

LISTENERS: Final = {
    "temporal": ("temporal", "temporal_ui"),
    "nats": ("nats",),
    "codec": ("codec",),
    "gateway": ("gateway",),
    "http": ("http",),
}
"""The fields of Ports that a kind listens on, metrics apart; the first is its address."""

METRICS: Final = {
    "temporal": "temporal_metrics",
    "codec": "codec_metrics",
    "gateway": "gateway_metrics",
    "gpu-worker": "gpu_worker_metrics",
    "notifier": "notifier_metrics",
    "trainer": "trainer_metrics",
    "http": "http_metrics",
}
"""The field of Ports where a kind serves its metrics."""

OPTIONAL: Final = frozenset({"trainer"})
"""The kinds that a stack has only if it is asked for them."""

STORE: Final = "store"
"""The folder of the store of files in a state folder."""

SERVERS: Final = ("temporal", "nats")
"""The kinds that must be ready before the others start."""


def _has_operators_endpoint(wiring: Wiring) -> bool:
    """Return whether the notifiers have an endpoint for jobs that name no target."""
    return bool(
        wiring.notifier_environment.keys() & {"NOTIFIER_DEFAULT_WEBHOOK_URL", "NOTIFIER_USERS", "NOTIFIER_TENANTS"}
    )


def program(name: str) -> str:
    """Return the path of a program, in the folder of the interpreter or on PATH. Raises ProgramMissing."""
    found = shutil.which(name, path=str(Path(sys.executable).parent)) or shutil.which(name)
    if found is None:
        raise ProgramMissing(name)
    return found
