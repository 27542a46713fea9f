"""One attempt to deliver one event to one target, within the limits of time and concurrency."""

import asyncio
import logging
import time
from collections.abc import Mapping
from contextlib import nullcontext
from datetime import timedelta

from opentelemetry import trace
from opentelemetry.semconv.attributes.error_attributes import ERROR_TYPE

from jobs.errors import RULES, DeliveryError, DeliveryFailed, DeliveryRefused, to_status
from jobs.ids import owner
from jobs.options import duration
from jobs.targets import describe, origin
from llm_pb import internal_pb2, llm_pb2
from runtime.keyed_limiter import KeyedLimiter
from services.notifier.event import to_event
from services.notifier.metrics import NotifierMetrics
from services.notifier.settings import NotifierSettings
from services.notifier.sinks.sink import OPERATORS, Answer, Sink

_log = logging.getLogger(__name__)


class Dispatcher:
    """Delivers events through the sinks of this process."""

    def __init__(self, sinks: Mapping[str, Sink], settings: NotifierSettings, metrics: NotifierMetrics) -> None:
        """The keys of `sinks` are the names of their targets' fields in NotifyTarget, and OPERATORS."""
        self._sinks = sinks
        self._settings = settings
        self._metrics = metrics
        self._users = KeyedLimiter(
            settings.max_per_user,
            lambda: DeliveryFailed(f"{settings.max_per_user} deliveries of the same user are under way already"),
        )
        self._tenants = KeyedLimiter(
            settings.max_per_tenant,
            lambda: DeliveryFailed(f"{settings.max_per_tenant} deliveries of the same tenant are under way already"),
        )
        limit = settings.max_per_destination + settings.max_waiting_per_destination
        self._destinations = KeyedLimiter(
            settings.max_per_destination,
            lambda: DeliveryFailed(f"{limit} deliveries to the same destination are under way already"),
            waiting=settings.max_waiting_per_destination,
        )

    async def deliver(
        self, request: internal_pb2.NotifyRequest, within: timedelta, tenant: str = ""
    ) -> internal_pb2.NotifyResponse:
        """Deliver the event of a tenant's job. The outcome is SKIPPED if neither the job nor the operator names a
        target."""
        target = request.target
        kind = target.WhichOneof("target") or "webhook"
        sink: str = kind
        shown = describe(target)
        if target.WhichOneof("target") is None:
            sink = OPERATORS
            secret_url = self._settings.endpoint(request.user_id, tenant).url
            if secret_url is None:
                return internal_pb2.NotifyResponse(state=llm_pb2.NOTIFY_STATE_SKIPPED)
            url = secret_url.get_secret_value()
            target = llm_pb2.NotifyTarget(webhook=llm_pb2.Webhook(url=url))
            # A hash would let the job's user guess the path of the operator's endpoint.
            shown = origin(url)
        about = {"delivery_id": request.notification_id, "target": shown}
        attempt = llm_pb2.DeliveryAttempt()
        attempt.time.GetCurrentTime()
        began = time.perf_counter()
        answer = await self._try(request, sink, target, within, tenant)
        self._metrics.attempted(kind, time.perf_counter() - began, answer.error)
        attempt.http_status = answer.http_status
        state = llm_pb2.NOTIFY_STATE_DELIVERED
        if answer.error is not None:
            attempt.error.CopyFrom(to_status(answer.error))
            again = RULES[type(answer.error)].retryable
            state = llm_pb2.NOTIFY_STATE_PENDING if again else llm_pb2.NOTIFY_STATE_FAILED
            span = trace.get_current_span()
            span.set_attribute(ERROR_TYPE, answer.error.reason)
            span.set_status(trace.Status(trace.StatusCode.ERROR, str(answer.error)))
            _log.warning("not delivered: %s", answer.error, extra={"error": answer.error.reason, **about})
        else:
            _log.info("delivered", extra=about)
        response = internal_pb2.NotifyResponse(target=shown, state=state, attempt=attempt)
        if answer.retry_after:
            response.retry_after.CopyFrom(duration(answer.retry_after))
        return response

    async def _try(
        self,
        request: internal_pb2.NotifyRequest,
        name: str,
        target: llm_pb2.NotifyTarget,
        within: timedelta,
        tenant: str,
    ) -> Answer:
        try:
            if name not in self._sinks:
                raise DeliveryRefused(f"this notifier does not deliver to targets of the kind {name}")
            sink = self._sinks[name]
            event = to_event(request, self._settings.event_source, self._settings.job_url)
            async with (
                asyncio.timeout(within.total_seconds()),
                self._users.acquired(owner(request.user_id, tenant)),
                self._tenants.acquired(tenant) if tenant else nullcontext(),
                self._destinations.acquired(sink.destination(target)),
            ):
                return await sink.deliver(target, event, request.user_id, tenant)
        except TimeoutError:
            return Answer(
                error=DeliveryFailed(f"the receiver did not accept the event within {within.total_seconds():g} s")
            )
        except DeliveryError as error:
            return Answer(error=error)
