"""Webhooks by the Standard Webhooks specification; the only module that speaks HTTP outwards."""

import io
import json
from datetime import UTC, datetime, timedelta
from email.utils import parsedate_to_datetime
from typing import Final

import aiohttp
from standardwebhooks import Webhook

from jobs.errors import DeliveryFailed, DeliveryRefused
from llm_pb import llm_pb2
from runtime.telemetry import current_headers
from services.notifier.event import CloudEvent
from services.notifier.settings import NotifierSettings
from services.notifier.sinks.egress_policy import Guard
from services.notifier.sinks.sink import CONTENT_TYPE, Answer

_GONE: Final = 410
_SAY_WHEN: Final = (429, 503)
"""What Retry-After belongs to."""
_MAX_HEADER_BYTES: Final = 8190
_LOOKUP_TRIES: Final = 5
"""Questions to a name server that does not answer, over 8 to 21 s, each a longer wait than the one before."""


class WebhookSink:
    """A Sink for NotifyTarget.webhook."""

    def __init__(self, settings: NotifierSettings, guard: Guard | None = None) -> None:
        """Must be made inside an event loop.

        `guard` decides where the webhooks may go; default: that of the settings, for URLs that clients choose.
        """
        self._settings = settings
        self._guard = guard or Guard(settings.webhook_schemes, settings.webhook_ports, settings.webhook_networks)
        proxy = settings.webhook_proxy
        self._proxy = proxy.get_secret_value() if proxy else None
        # The names of an operator's own servers may be known to the system's name servers alone.
        servers = settings.dns_servers if guard is None and proxy is None else ()
        # Without threads: names that nobody answers for, however many, take nothing that others need.
        self._resolver = aiohttp.AsyncResolver(nameservers=servers, tries=_LOOKUP_TRIES)
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(
                resolver=self._resolver,
                # Through a proxy the connection goes to the operator's own address.
                socket_factory=None if proxy else self._guard.socket,
                # One address after the other, so that the first that is refused refuses the webhook.
                happy_eyeballs_delay=None,
                use_dns_cache=False,
                force_close=True,
                limit=0,
            ),
            cookie_jar=aiohttp.DummyCookieJar(),
            headers={"User-Agent": "durable-llm-notifier", "Content-Type": CONTENT_TYPE},
            timeout=aiohttp.ClientTimeout(total=settings.webhook_timeout.total_seconds()),
            max_line_size=_MAX_HEADER_BYTES,
            max_field_size=_MAX_HEADER_BYTES,
        )

    def destination(self, target: llm_pb2.NotifyTarget) -> str:
        """See Sink. The server, whatever the path."""
        return str(self._guard.parse(target.webhook.url).origin())

    async def deliver(self, target: llm_pb2.NotifyTarget, event: CloudEvent, user_id: str) -> Answer:
        """POST the event. 2xx is success, 410 ends the deliveries for good; a redirect is a failure, not followed."""
        url = self._guard.parse(target.webhook.url)
        body = json.dumps(event, ensure_ascii=False)
        try:
            async with self._session.post(
                url,
                data=io.BytesIO(body.encode()),
                headers={**self._signed(event["id"], body, user_id), **current_headers()},
                allow_redirects=False,
                proxy=self._proxy,
            ) as response:
                # The status says it all: the body is not read, however long it is.
                return _answer(response)
        except TimeoutError as error:
            longest = self._settings.webhook_timeout.total_seconds()
            raise DeliveryFailed(f"the webhook did not answer within {longest:g} s") from error
        except (aiohttp.ClientError, ValueError, OSError) as error:
            raise DeliveryFailed(f"the webhook could not be reached: {type(error).__name__}") from error

    async def close(self) -> None:
        """See Sink."""
        await self._session.close()
        await self._resolver.close()

    def _signed(self, id_: str, body: str, user_id: str) -> dict[str, str]:
        """Return the headers of Standard Webhooks: one signature for each secret that is active."""
        now = datetime.now(UTC)
        headers = {"webhook-id": id_, "webhook-timestamp": str(int(now.timestamp()))}
        user = self._settings.users.get(user_id)
        secrets = user.secrets if user and user.secrets else self._settings.webhook_secrets
        if secrets:
            signatures = (Webhook(secret.get_secret_value()).sign(id_, now, body) for secret in secrets)
            headers["webhook-signature"] = " ".join(signatures)
        return headers


def _answer(response: aiohttp.ClientResponse) -> Answer:
    status = response.status
    if 200 <= status < 300:
        return Answer(status)
    if status == _GONE:
        return Answer(status, DeliveryRefused(f"the webhook answered {status}: it is gone for good"))
    wait = _retry_after(response.headers.get("Retry-After", "")) if status in _SAY_WHEN else timedelta(0)
    return Answer(status, DeliveryFailed(f"the webhook answered {status}; 2xx would be success"), wait)


def _retry_after(text: str) -> timedelta:
    """Return what the header asks for, in seconds or as a date (RFC 9110, 10.2.3); 0 for what is neither."""
    try:
        if text.isascii() and text.isdigit():
            return timedelta(seconds=int(text))
        return max(parsedate_to_datetime(text) - datetime.now(UTC), timedelta(0))
    except (ValueError, TypeError, OverflowError):
        return timedelta(0)
