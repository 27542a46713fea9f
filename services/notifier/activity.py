"""NotifyUI: one attempt to deliver one event to one target."""

from datetime import timedelta
from typing import Final

from temporalio import activity

from jobs import names
from llm_pb import llm_pb2
from services.notifier.dispatcher import Courier

_SHARE: Final = 0.9
"""Of the time that Temporal gives an attempt: the rest is for saying how it went."""


class NotifyUI:
    """The activity, bound to this process's sinks."""

    def __init__(self, courier: Courier) -> None:
        self._courier = courier

    @activity.defn(name=names.ACTIVITY_NOTIFY)
    async def __call__(self, request: llm_pb2.NotifyRequest) -> llm_pb2.NotifyResponse:
        """Deliver; an attempt that fails is a response, too: when to try again is the workflow's to decide."""
        limit = activity.info().start_to_close_timeout or timedelta.max
        return await self._courier.deliver(request, limit * _SHARE)
