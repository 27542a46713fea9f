"""The seam between the notifier and the places that it delivers to: one module for each kind."""

from dataclasses import dataclass
from datetime import timedelta
from typing import Final, Protocol

from jobs.errors import DeliveryError
from llm_pb import llm_pb2
from services.notifier.event import CloudEvent

CONTENT_TYPE: Final = "application/cloudevents+json; charset=UTF-8"
"""Of an event in structured mode, the same by HTTP, NATS and Kafka."""
OPERATORS: Final = "operator's webhook"
"""The sink for the endpoints of the settings, which may be where no client's URL may lead."""


@dataclass(frozen=True)
class Answer:
    """What a receiver said."""

    http_status: int = 0
    """0 where there is none."""
    error: DeliveryError | None = None
    """Why it did not take the event; None when it did."""
    retry_after: timedelta = timedelta(0)
    """How long it asks to be left alone."""


class Sink(Protocol):
    """Delivers events to one kind of target."""

    def destination(self, target: llm_pb2.NotifyTarget) -> str:
        """Return what the target shares with others that are slow or away when it is: a server, a topic."""
        ...

    async def deliver(self, target: llm_pb2.NotifyTarget, event: CloudEvent, user_id: str) -> Answer:
        """Return once the receiver has taken the event, or said that it does not. May be cancelled at any time.

        Raises DeliveryFailed when it could not be asked and a later attempt may do, DeliveryRefused when none will.
        """
        ...

    async def close(self) -> None:
        """Release connections."""
        ...
