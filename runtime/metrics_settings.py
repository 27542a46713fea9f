"""The settings of the listener for metrics and health, to be inherited by the service's settings."""

from pathlib import Path

from pydantic_settings import SettingsConfigDict

from runtime.tls import MetricsTlsSettings


class MetricsSettings(MetricsTlsSettings):
    """Where a service serves metrics and health, and to whom."""

    model_config = SettingsConfigDict(frozen=True, use_attribute_docstrings=True)

    metrics_host: str = "127.0.0.1"
    """Address to serve Prometheus metrics on; loopback unless set."""
    metrics_port: int
    metrics_api_keys_file: Path | None = None
    """File of the API keys that may read the metrics, which `python -m services.gateway.keys` writes: those with the
    scope `admin:metrics`. It is read again whenever it has changed. Health needs no key. Unset: the metrics need none
    either."""
