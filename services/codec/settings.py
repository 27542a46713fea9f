"""Settings of the codec server."""

from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, field_validator
from pydantic_settings import NoDecode, SettingsConfigDict

from runtime.auth_settings import AuthSettings
from runtime.metrics_settings import MetricsSettings


class CodecSettings(AuthSettings, MetricsSettings):
    """The codec server: shows payloads as JSON in Temporal's Web UI and CLI."""

    model_config = SettingsConfigDict(
        env_prefix="CODEC_", frozen=True, use_attribute_docstrings=True, hide_input_in_errors=True
    )

    port: int = Field(default=8234, ge=0, le=65535)
    """Port to listen on; 0 takes a free one and logs it."""
    metrics_port: int = Field(default=9468, ge=0, le=65535)
    """Port to serve Prometheus metrics on; 0 takes a free one and logs it."""
    allowed_hosts: Annotated[tuple[str, ...], NoDecode] = ("localhost", "127.0.0.1", "::1")
    """The names and addresses by which the server may be called, as well as CODEC_HOST, separated by commas."""
    allowed_origins: Annotated[tuple[str, ...], NoDecode] = ("http://localhost:8233", "http://127.0.0.1:8233")
    """The Web UIs whose pages may call the server, as scheme://host[:port], separated by commas."""
    max_request_bytes: int = Field(default=16 * 1024 * 1024, ge=1)
    """Maximum size of a request's body, in bytes. A page of history has at most 4 MB, a third more in base64."""

    audit: Path | None = None
    """File of the audit log: a record of each request that decrypts, encrypts or is refused, stored before its answer.
    Each codec server needs a file of its own. Unset: the process's log alone has them, at the level INFO."""

    @field_validator("allowed_hosts", "allowed_origins", mode="before")
    @classmethod
    def _split(cls, value: Any) -> Any:
        return tuple(item.strip() for item in value.split(",") if item.strip()) if isinstance(value, str) else value
