"""The settings of the listener for metrics and health, to be inherited by the service's settings."""

from typing import Self

from pydantic import model_validator
from pydantic_settings import SettingsConfigDict

from runtime.addresses import is_loopback
from runtime.auth_keys import KeysFile
from runtime.tls import MetricsTlsSettings


class MetricsSettings(MetricsTlsSettings):
    """Where a service serves metrics and health, and to whom."""

    model_config = SettingsConfigDict(frozen=True, use_attribute_docstrings=True)

    metrics_host: str = "127.0.0.1"
    """Address to serve Prometheus metrics and health on; loopback unless set."""
    metrics_port: int
    metrics_api_keys_file: KeysFile | None = None
    """File of the API keys that may read the metrics, which `python -m services.gateway.keys` writes: those with the
    scope `admin:metrics`. It is read again whenever it has changed. Health needs no key. Unset: the metrics need none
    either."""
    metrics_allow_anonymous: bool = False
    """Whether everybody who reaches the port may read the metrics although it is not on loopback. Without it, and
    without …_METRICS_API_KEYS_FILE or …_METRICS_TLS_CLIENT_CA, the process does not start there."""

    @model_validator(mode="after")
    def _readers_are_known(self) -> Self:
        prefix = f"{self.model_config.get('env_prefix', '')}METRICS_"
        known = self.metrics_api_keys_file is not None or self.metrics_tls_client_ca is not None
        if known or self.metrics_allow_anonymous or is_loopback(self.metrics_host):
            return self
        raise ValueError(
            f"{prefix}HOST {self.metrics_host} is not loopback, and everybody who reaches it would read the metrics. "
            f"Set {prefix}API_KEYS_FILE or {prefix}TLS_CLIENT_CA; or, in a network of which everybody may, "
            f"{prefix}ALLOW_ANONYMOUS=true"
        )
