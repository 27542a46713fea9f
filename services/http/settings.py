"""Settings of the HTTP front."""

import re
from datetime import timedelta
from typing import Annotated, Any, Final, Self

from pydantic import Field, field_validator, model_validator
from pydantic_settings import NoDecode, SettingsConfigDict

from durable_llm._address import require_ports
from runtime.addresses import is_loopback
from runtime.files import ReadableFile
from runtime.metrics_settings import MetricsSettings
from runtime.tls import ClientTls, ServerTlsSettings, client_tls
from services.http.signin.settings import SignInSettings

_URL: Final = re.compile(r"https?://\S+")
_LINK: Final = re.compile(r"https?://[^\s{}]*(\{(trace_id|workflow_id|run_id)\}[^\s{}]*)*")


class HttpSettings(SignInSettings, ServerTlsSettings, MetricsSettings):
    """The HTTP front: the REST API, OpenAI's API and the console, a client of the gateway."""

    model_config = SettingsConfigDict(
        env_prefix="HTTP_", frozen=True, use_attribute_docstrings=True, hide_input_in_errors=True
    )

    host: str = "127.0.0.1"
    """Address to listen on; loopback unless set."""
    port: int = Field(8080, ge=0, le=65535)
    """Port to listen on; 0 takes a free one and logs it."""
    metrics_port: int = Field(9469, ge=0, le=65535)
    """Port to serve Prometheus metrics on; 0 takes a free one and logs it."""
    allow_anonymous: bool = False
    """Whether the front may listen elsewhere than on loopback although the gateway asks for no credential, because a
    proxy in front of it authenticates the callers. Otherwise the front does not start there."""
    gateway: str = Field("127.0.0.1:50051", min_length=1)
    """Address of the gateway, as gRPC takes it: host:port, `dns:///name:port`, or `ipv4:10.0.0.1:50051,10.0.0.2:50051`.
    Calls go to all its addresses in turn."""
    gateway_tls_ca: ReadableFile | None = None
    """PEM file of the CAs that may have issued the gateway's certificate. Unset: no TLS."""
    gateway_tls_cert: ReadableFile | None = None
    """PEM file of the front's own certificate for the gateway, followed by the intermediate ones. The gateway must
    give it the scope `proxy`. A changed file is read when the front restarts."""
    gateway_tls_key: ReadableFile | None = None
    """PEM file of the private key of the front's own certificate, not encrypted."""
    gateway_timeout: timedelta = Field(timedelta(seconds=30), gt=timedelta(0))
    """Maximum time that a call to the gateway takes; streams have no limit."""
    gateway_retry: timedelta = Field(timedelta(seconds=5), ge=timedelta(0))
    """Time for which a call or a stream is tried again while no gateway answers. After that a request is answered with
    503 or 504, and a stream ends, so that its client comes back. PT0S: there is one try."""
    allowed_hosts: Annotated[tuple[str, ...], NoDecode] = ("localhost", "127.0.0.1", "::1")
    """Names and addresses by which the front may be called in addition to HTTP_HOST, separated by commas. `*` allows
    any, which is safe only where the gateway asks for credentials."""
    cors_origins: Annotated[tuple[str, ...], NoDecode] = ()
    """The origins whose pages may call the front, as scheme://host[:port], separated by commas; `*` for all. Unset:
    only pages of the front itself."""
    max_body_bytes: int = Field(4 * 1024 * 1024, ge=1024)
    """Maximum size of a request's body, in bytes. JSON may need twice the bytes of the job in it."""
    max_output_bytes: int = Field(8 * 1024 * 1024, ge=1024 * 1024)
    """Maximum size of an output that is put into one answer or event of OpenAI's API, in bytes. A larger one can be
    streamed, and downloaded from `/jobs/{id}/output`."""
    max_connections: int = Field(4000, ge=1)
    """Maximum number of concurrent connections. Requests of further ones get 503."""
    max_streams: int = Field(1500, ge=1, le=2000)
    """Maximum number of concurrent streams. Further ones get 503. The gateway takes 2000 calls on one connection
    (GATEWAY_MAX_CALLS_PER_CONNECTION), and calls that are no streams need some of them."""
    request_timeout: timedelta = Field(timedelta(seconds=20), ge=timedelta(milliseconds=100))
    """Maximum time for a client to send the head of a request, and as long again for its body, or for each 16 KiB of a
    file."""
    keep_alive: timedelta = Field(timedelta(seconds=75), ge=timedelta(seconds=1))
    """Time after which a connection without a request is closed."""
    stall_timeout: timedelta = Field(timedelta(minutes=2), ge=timedelta(milliseconds=100))
    """Maximum time for which a client may leave what was sent to it unread. The front then closes the connection."""
    stream_keepalive: timedelta = Field(timedelta(seconds=15), gt=timedelta(0))
    """Maximum time without data on a stream. A comment is sent when there is no event."""
    stream_retry: timedelta = Field(timedelta(seconds=1), gt=timedelta(0))
    """Wait of a browser before it opens a broken stream again."""
    unwatched_timeout: timedelta = Field(timedelta(minutes=1), ge=timedelta(seconds=10), le=timedelta(days=1))
    """Time after which the job of a request of OpenAI's API that is not in the background is cancelled when its front
    has died. It is at least a 2,000th of the job's total time: see `cancel_if_unwatched`."""
    console: bool = True
    """Whether the front has the console, pages for people at `/console/`."""
    console_docs_url: str = ""
    """The link from the reason of an error in the console to its documentation, such as the address of
    `docs/errors.md`. Unset: there is no link. The page explains the reason in any case."""
    console_trace_url: str = ""
    """The link from a job's page in the console to its trace; `{trace_id}` stands for the id of the trace. Unset: there
    is no link."""
    console_temporal_url: str = ""
    """The link from a job's page in the console to Temporal's Web UI; `{workflow_id}` and `{run_id}` stand for the
    job's ids. Unset: there is no link."""
    shutdown_grace: timedelta = Field(timedelta(seconds=10), ge=timedelta(0))
    """Maximum time for running requests to end after SIGTERM. Streams end at once. PT0S: all requests end at once."""

    @property
    def gateway_tls(self) -> ClientTls | None:
        """The files of the connection to the gateway. None: no TLS."""
        return client_tls(self, "gateway_")

    @field_validator("gateway")
    @classmethod
    def _gateway_has_ports(cls, value: str) -> str:
        require_ports(value)
        return value

    @field_validator("console_docs_url")
    @classmethod
    def _is_a_url(cls, url: str) -> str:
        if url and _URL.fullmatch(url) is None:
            raise ValueError("must begin with http:// or https://, and have no spaces")
        return url

    @field_validator("console_trace_url", "console_temporal_url")
    @classmethod
    def _is_a_link(cls, url: str) -> str:
        if url and _LINK.fullmatch(url) is None:
            raise ValueError(
                "must begin with http:// or https://, have no spaces, and no braces but {trace_id}, {workflow_id} and"
                " {run_id}"
            )
        return url

    @field_validator("allowed_hosts", "cors_origins", mode="before")
    @classmethod
    def _split(cls, value: Any) -> Any:
        return tuple(item.strip() for item in value.split(",") if item.strip()) if isinstance(value, str) else value

    @model_validator(mode="after")
    def _sessions_outlive_the_process(self) -> Self:
        if self.console and self.session_key_file is None and not is_loopback(self.host):
            raise ValueError(
                f"HTTP_HOST {self.host} is not loopback: the console needs HTTP_SESSION_KEY_FILE there, the same at"
                " every front; HTTP_CONSOLE=false is a front without it"
            )
        return self

    @model_validator(mode="after")
    def _gateway_tls_can_be_used(self) -> Self:
        client_tls(self, "gateway_")
        return self
