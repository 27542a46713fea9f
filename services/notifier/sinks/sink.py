"""The interface between the notifier and its targets, with one module for each kind of target."""

from dataclasses import dataclass
from datetime import timedelta
from typing import Final, Protocol

from jobs.errors import DeliveryError
from llm_pb import llm_pb2
from services.notifier.event import CloudEvent

CONTENT_TYPE: Final = "application/cloudevents+json; charset=UTF-8"
"""Content type of an event in structured mode, the same over HTTP, NATS and Kafka."""
OPERATORS: Final = "operator's webhook"
"""Key of the sink for the endpoints in the settings, which may have addresses that a client's URL may not."""


@dataclass(frozen=True)
class Answer:
    """The answer of a receiver."""

    http_status: int = 0
    """The status of the HTTP response. 0 if there is none."""
    error: DeliveryError | None = None
    """Why the receiver did not accept the event. None if it did."""
    retry_after: timedelta = timedelta(0)
    """Minimum wait before the next attempt, as the receiver asks. 0 if it asks for none."""


class Sink(Protocol):
    """Delivers events to one kind of target."""

    def destination(self, target: llm_pb2.NotifyTarget) -> str:
        """Return what the target shares with others that are slow or unavailable when it is: a server, a topic."""
        ...

    async def deliver(self, target: llm_pb2.NotifyTarget, event: CloudEvent, user_id: str, tenant: str = "") -> Answer:
        """Deliver the event of a user's job, and return the receiver's answer. May be cancelled at any time.

        Raises DeliveryFailed if the receiver gave no answer and a later attempt may succeed, DeliveryRefused if none
        will.
        """
        ...

    async def close(self) -> None:
        """Release connections."""
        ...
