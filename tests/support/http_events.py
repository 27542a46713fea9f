"""Server-sent events as a browser reads them."""

import json
from collections.abc import AsyncIterator, Iterable
from dataclasses import dataclass
from typing import Any

import httpx


@dataclass(frozen=True)
class Event:
    """An event that a browser dispatches."""

    name: str
    id: str
    """The last event id: that of an earlier event, if this one has none."""
    data: str

    @property
    def json(self) -> dict[str, Any]:
        value: dict[str, Any] = json.loads(self.data)
        return value


async def events_of(answer: httpx.Response) -> AsyncIterator[Event]:
    """Yield the events of a stream, as https://html.spec.whatwg.org/multipage/server-sent-events.html parses them."""
    assert answer.headers["content-type"] == "text/event-stream; charset=utf-8"
    name, last_id, data = "", "", list[str]()
    async for line in answer.aiter_lines():
        if not line:
            if data:
                yield Event(name or "message", last_id, "\n".join(data))
            name, data = "", []
            continue
        field, _, value = line.partition(":")
        value = value.removeprefix(" ")
        if field == "event":
            name = value
        elif field == "id":
            last_id = value
        elif field == "data":
            data.append(value)


def text_of(events: Iterable[Event]) -> str:
    """Return the text that the deltas of a job's events make."""
    output = b""
    for event in events:
        if event.name in ("update", "end") and (delta := event.json.get("delta")):
            assert int(delta["offset"]) <= len(output), "the deltas have a gap"
            assert delta["rewind"] == (int(delta["offset"]) < len(output))
            output = output[: int(delta["offset"])] + delta["text"].encode()
    return output.decode()
