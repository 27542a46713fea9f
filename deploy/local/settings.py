"""The stack's settings, all in the environment with the prefix STACK_."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field
from pydantic_settings import BaseSettings, SettingsConfigDict

Port = Annotated[int, Field(ge=0, le=65535)]
"""A TCP port on the loopback interface; 0 takes any free one."""


class StackSettings(BaseSettings):
    """The stack on one machine: where it keeps its state, which ports it takes and how much of it runs.

    The services' own settings (GATEWAY_*, GPU_WORKER_*, NOTIFIER_*, CODEC_*, OTEL_*) reach them in the environment.
    """

    model_config = SettingsConfigDict(env_prefix="STACK_", frozen=True, use_attribute_docstrings=True)

    state_dir: Path = Path(".stack")
    """Database, feed and logs, for its owner alone: a new folder, or one of mode 0700. A stack started again in the
    same folder knows the jobs of the last one."""

    temporal_port: Port = 7233
    """Temporal's port. This and the next ones: 0 takes any free port."""
    temporal_ui_port: Port = 8233
    """The port of Temporal's Web UI."""
    temporal_metrics_port: Port = 9467
    """Where Temporal serves its metrics. Prometheus: see deploy/observability."""
    nats_port: Port = 4222
    """The port of the feed's broker."""
    codec_port: Port = 8234
    """The port of the codec server."""
    codec_metrics_port: Port = 9468
    """Where the codec server serves its metrics."""
    gateway_port: Port = 50051
    """The port of the gateway."""
    gateway_metrics_port: Port = 9464
    """Where the gateway serves its metrics."""
    gpu_worker_metrics_port: Port = 9465
    """Where the GPU worker serves its metrics; a second one takes a free port."""
    notifier_metrics_port: Port = 9466
    """Where the notifier serves its metrics."""
    demo_webhook_port: Port = 8235
    """Where the demo receives the outcome."""

    engine: Literal["torch", "vllm", "simulated"] = "torch"
    """The engine of the GPU workers: torch, vllm or simulated."""
    gpu_workers: Annotated[int, Field(ge=0)] = 1
    """How many GPU workers run."""

    tls: bool = False
    """Whether gateway, metrics, codec server and NATS speak TLS, and NATS knows the services by NKeys. Each start makes
    a CA of its own: tls/ca.pem in STACK_STATE_DIR. Temporal's development server knows no TLS and stays in clear."""

    start_timeout: Annotated[float, Field(gt=0)] = 180
    """Seconds that a process may take until it is ready; a big model needs more."""
    stop_grace: Annotated[float, Field(ge=0)] = 15
    """Seconds between SIGTERM and SIGKILL."""
