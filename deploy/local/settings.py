"""The stack's settings, all in the environment with the prefix STACK_."""

from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field
from pydantic_settings import BaseSettings, SettingsConfigDict

Port = Annotated[int, Field(ge=0, le=65535)]
"""A TCP port on the loopback interface. 0 takes any free port."""


class StackSettings(BaseSettings):
    """The stack on one machine: its state folder, its ports, and how many workers it runs.

    The services read their own settings (GATEWAY_*, GPU_WORKER_*, NOTIFIER_*, HTTP_*, CODEC_*, OTEL_*) from the
    environment.
    """

    model_config = SettingsConfigDict(env_prefix="STACK_", frozen=True, use_attribute_docstrings=True)

    state_dir: Path = Path(".stack")
    """The folder of database, feed and logs, for its owner alone: a new folder, or one of mode 0700. A stack that is
    started again in the same folder knows the jobs of the last one."""

    temporal_port: Port = 7233
    """The port of Temporal. For this and all other ports 0 takes any free one."""
    temporal_ui_port: Port = 8233
    """The port of Temporal's Web UI."""
    temporal_metrics_port: Port = 9467
    """The port of Temporal's metrics. deploy/observability has a Prometheus configuration."""
    nats_port: Port = 4222
    """The port of NATS, the broker of the feed."""
    codec_port: Port = 8234
    """The port of the codec server."""
    codec_metrics_port: Port = 9468
    """The port of the codec server's metrics."""
    gateway_port: Port = 50051
    """The port of the gateway."""
    gateway_metrics_port: Port = 9464
    """The port of the gateway's metrics."""
    gpu_worker_metrics_port: Port = 9465
    """The port of the GPU worker's metrics. A second worker takes a free port."""
    notifier_metrics_port: Port = 9466
    """The port of the notifier's metrics."""
    trainer_metrics_port: Port = 9470
    """The port of the trainer's metrics, where a stack has one."""
    http_port: Port = 8080
    """The port of the HTTP front."""
    http_metrics_port: Port = 9469
    """The port of the HTTP front's metrics."""
    demo_webhook_port: Port = 8235
    """The port at which the demo receives the outcome."""

    engine: Literal["torch", "vllm", "openai", "simulated"] = "torch"
    """The engine of the GPU workers: torch, vllm, simulated, or openai, which needs GPU_WORKER_ENGINE_OPTIONS."""
    gpu_workers: Annotated[int, Field(ge=0)] = 1
    """Number of GPU workers."""

    tls: bool = False
    """Whether gateway, HTTP front, metrics, codec server and NATS use TLS, and the services authenticate to NATS by
    NKeys. Each start creates a CA, tls/ca.pem in STACK_STATE_DIR. Temporal's development server has no TLS and stays in
    clear."""

    start_timeout: Annotated[float, Field(gt=0)] = 180
    """Maximum time until a process is ready, in seconds. A large model needs more."""
    stop_grace: Annotated[float, Field(ge=0)] = 25
    """Time in seconds between SIGTERM and SIGKILL, at least twice that of a gateway. 0: SIGKILL follows at once."""

    @classmethod
    def with_free_ports(cls, **values: Any) -> Self:
        """Return settings with these values and free ports, so that several stacks can run at the same time."""
        ports = {name: 0 for name in cls.model_fields if name.endswith("_port")}
        return cls(**{**ports, **values})
