"""Webhooks by the Standard Webhooks specification. Only this module sends HTTP requests."""

import io
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from email.utils import parsedate_to_datetime
from typing import Final

import aiohttp
from aiohttp import hdrs
from opentelemetry import trace
from opentelemetry.semconv.attributes.error_attributes import ERROR_TYPE
from opentelemetry.semconv.attributes.http_attributes import HTTP_REQUEST_METHOD, HTTP_RESPONSE_STATUS_CODE
from opentelemetry.semconv.attributes.server_attributes import SERVER_ADDRESS, SERVER_PORT
from opentelemetry.semconv.attributes.url_attributes import URL_FULL
from opentelemetry.trace import Span, SpanKind, Status, StatusCode, Tracer
from pydantic import SecretStr
from standardwebhooks import Webhook
from yarl import URL

from jobs.errors import DeliveryFailed, DeliveryRefused, error_type
from llm_pb import llm_pb2
from runtime.telemetry import current_headers
from services.notifier.event import CloudEvent
from services.notifier.openai_event import to_openai_event
from services.notifier.settings import NotifierSettings
from services.notifier.sinks.egress_policy import EgressPolicy
from services.notifier.sinks.sink import CONTENT_TYPE, Answer

_GONE: Final = 410
_WITH_RETRY_AFTER: Final = (429, 503)
"""Statuses whose Retry-After header counts."""
_MAX_HEADER_BYTES: Final = 8190
_FAILURES: Final[tuple[tuple[type[Exception], str], ...]] = (
    (aiohttp.ClientConnectorDNSError, "the webhook could not be reached: its name does not resolve"),
    (aiohttp.ClientProxyConnectionError, "the proxy for webhooks could not be reached"),
    (aiohttp.ClientConnectorCertificateError, "the webhook could not be reached: its TLS certificate is not valid"),
    (aiohttp.ClientSSLError, "the webhook could not be reached: the TLS handshake failed"),
    (aiohttp.ClientConnectorError, "the webhook could not be reached: it accepted no connection"),
    (aiohttp.ClientConnectionError, "the webhook closed the connection before it had answered"),
    (aiohttp.ClientResponseError, "the webhook's answer is not valid HTTP"),
    (ValueError, "the webhook's URL cannot be used"),
    (Exception, "the connection to the webhook broke"),
)
"""What a failure without an HTTP status means. The first kind that matches counts."""
_LONGEST_RETRY_AFTER: Final = timedelta(days=365)
"""Wait for which a longer Retry-After counts. The job's maximum interval between two attempts is far shorter."""
_LOOKUP_TRIES: Final = 5
"""Maximum number of queries to a name server that does not answer. Their waits grow, and add up to 8 to 21 s."""


class WebhookSink:
    """A Sink for NotifyTarget.webhook."""

    def __init__(self, settings: NotifierSettings, policy: EgressPolicy | None = None) -> None:
        """Create the sink. Must be called inside an event loop.

        `policy` decides which destinations webhooks may have, by default the policy of the settings, for URLs that
        clients choose.
        """
        self._settings = settings
        self._tracer = trace.get_tracer(__package__)
        self._policy = policy or EgressPolicy(
            settings.webhook_schemes, settings.webhook_ports, settings.webhook_networks
        )
        proxy = settings.webhook_proxy
        self._proxy = proxy.get_secret_value() if proxy else None
        # The operator's own servers may be known only to the system's name servers.
        servers = settings.dns_servers if policy is None and proxy is None else ()
        # The resolver uses no threads, so lookups that get no answer, however many, take no thread from others.
        self._resolver = aiohttp.AsyncResolver(nameservers=servers, tries=_LOOKUP_TRIES)
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(
                resolver=self._resolver,
                # Through a proxy the connection goes to the operator's own address.
                socket_factory=None if proxy else self._policy.socket,
                # Addresses are tried one after the other, so that the first that is refused refuses the webhook.
                happy_eyeballs_delay=None,
                use_dns_cache=False,
                force_close=True,
                limit=0,
            ),
            cookie_jar=aiohttp.DummyCookieJar(),
            headers={"User-Agent": "durable-llm-notifier"},
            timeout=aiohttp.ClientTimeout(total=settings.webhook_timeout.total_seconds()),
            max_line_size=_MAX_HEADER_BYTES,
            max_field_size=_MAX_HEADER_BYTES,
        )

    def destination(self, target: llm_pb2.NotifyTarget) -> str:
        """See Sink. It is the server, whatever the path."""
        return str(self._policy.parse(target.webhook.url).origin())

    async def deliver(self, target: llm_pb2.NotifyTarget, event: CloudEvent, user_id: str, tenant: str = "") -> Answer:
        """POST the event. 2xx is success, 410 a permanent failure. A redirect is a failure and is not followed."""
        url = self._policy.parse(target.webhook.url)
        body, content_type = json.dumps(event, ensure_ascii=False), CONTENT_TYPE
        if target.webhook.format == llm_pb2.WEBHOOK_FORMAT_OPENAI:
            body, content_type = json.dumps(to_openai_event(event)), "application/json"
        secrets = self._settings.endpoint(user_id, tenant).secrets
        try:
            with _request_span(self._tracer, url) as span:
                async with self._session.post(
                    url,
                    data=io.BytesIO(body.encode()),
                    headers={
                        hdrs.CONTENT_TYPE: content_type,
                        **self._signed(event["id"], body, secrets),
                        **current_headers(),
                    },
                    allow_redirects=False,
                    proxy=self._proxy,
                ) as response:
                    _describe_response(span, response.status)
                    # Only the status counts. The body is not read, however long it is.
                    return _answer(response)
        except TimeoutError as error:
            limit = self._settings.webhook_timeout.total_seconds()
            raise DeliveryFailed(f"the webhook did not answer within {limit:g} s") from error
        except aiohttp.ClientHttpProxyError as error:
            raise DeliveryFailed(f"the proxy for webhooks answered {error.status}") from error
        except (aiohttp.ClientError, ValueError, OSError) as error:
            raise DeliveryFailed(next(text for kind, text in _FAILURES if isinstance(error, kind))) from error

    async def close(self) -> None:
        """See Sink."""
        await self._session.close()
        await self._resolver.close()

    def _signed(self, id_: str, body: str, secrets: Sequence[SecretStr]) -> dict[str, str]:
        """Return the headers of Standard Webhooks: one signature for each secret that is active."""
        now = datetime.now(UTC)
        headers = {"webhook-id": id_, "webhook-timestamp": str(int(now.timestamp()))}
        if secrets:
            signatures = (Webhook(secret.get_secret_value()).sign(id_, now, body) for secret in secrets)
            headers["webhook-signature"] = " ".join(signatures)
        return headers


@contextmanager
def _request_span(tracer: Tracer, url: URL) -> Iterator[Span]:
    """Start the span of one request, current while the context is open, by OpenTelemetry's conventions for HTTP.

    It holds only the origin of the URL, because whoever knows the rest may send there.
    """
    attributes: dict[str, str | int] = {
        HTTP_REQUEST_METHOD: hdrs.METH_POST,
        URL_FULL: str(url.origin()),
        SERVER_ADDRESS: url.raw_host or "",
        SERVER_PORT: url.port or 0,
    }
    with tracer.start_as_current_span(
        hdrs.METH_POST,
        kind=SpanKind.CLIENT,
        attributes=attributes,
        # A library's exception may hold the whole URL.
        record_exception=False,
        set_status_on_exception=False,
    ) as span:
        try:
            yield span
        except BaseException as error:
            # This includes the cancel of a delivery whose time is over.
            span.set_attribute(ERROR_TYPE, error_type(error))
            span.set_status(Status(StatusCode.ERROR))
            raise


def _describe_response(span: Span, status: int) -> None:
    span.set_attribute(HTTP_RESPONSE_STATUS_CODE, status)
    if status >= 400:
        span.set_attribute(ERROR_TYPE, str(status))
        span.set_status(Status(StatusCode.ERROR))


def _answer(response: aiohttp.ClientResponse) -> Answer:
    status = response.status
    if 200 <= status < 300:
        return Answer(status)
    if status == _GONE:
        return Answer(status, DeliveryRefused(f"the webhook answered {status}: it is gone for good"))
    wait = _retry_after(response.headers.get("Retry-After", "")) if status in _WITH_RETRY_AFTER else timedelta(0)
    return Answer(status, DeliveryFailed(f"the webhook answered {status}; 2xx would be success"), wait)


def _retry_after(text: str) -> timedelta:
    """Return the wait that the header asks for, in seconds or as a date (RFC 9110, 10.2.3); 0 if it is neither."""
    try:
        if text.isascii() and text.isdigit():
            # Python's numbers and times are limited, a header's digits are not.
            return timedelta(seconds=int(text)) if len(text.lstrip("0")) < 8 else _LONGEST_RETRY_AFTER
        return max(parsedate_to_datetime(text) - datetime.now(UTC), timedelta(0))
    except (ValueError, TypeError, OverflowError):
        return timedelta(0)
