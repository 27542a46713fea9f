"""NotifyUI: one attempt to deliver one event to one target."""

from datetime import timedelta
from typing import Final

from temporalio import activity

from jobs import names
from jobs.ids import tenant_of
from llm_pb import internal_pb2
from services.notifier.dispatcher import Dispatcher

_SHARE: Final = 0.9
"""Share of an attempt's timeout that the delivery may take. The rest is for reporting its outcome."""


class NotifyUI:
    """The activity, bound to this process's sinks."""

    def __init__(self, dispatcher: Dispatcher) -> None:
        self._dispatcher = dispatcher

    @activity.defn(name=names.ACTIVITY_NOTIFY)
    async def __call__(self, request: internal_pb2.NotifyRequest) -> internal_pb2.NotifyResponse:
        """Deliver the event. A failure is an outcome, too, because the workflow decides when to try again."""
        info = activity.info()
        limit = info.start_to_close_timeout or timedelta.max
        return await self._dispatcher.deliver(request, limit * _SHARE, tenant_of(info.workflow_id or ""))
