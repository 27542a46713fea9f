"""The events of a response, a pure function of what its job has generated.

Each event has a number that any replica gives it, at any time:

    0 created, 1 queued, 2 in_progress, 3 output_item.added, 4 content_part.added
    4 + n     the output_text.delta whose text ends at byte n of the output
    5 + N     output_text.done, where N is the size of the output; then content_part.done, output_item.done, the end

Each rewind, where output that readers may hold was replaced, raises all numbers by 2^36. So a number says which output
its reader holds, and how much of it; a stream that continues after a number needs no memory of the first stream.
"""

from collections.abc import Iterator
from typing import Any, Final, NamedTuple

from llm_pb import llm_pb2
from services.http.openai.logprobs import logprobs_of
from services.http.openai.outcome import Ending, response_status
from services.http.openai.response_object import has_item, item_id, message_item, response_object, text_part

EPOCH: Final = 2**36
"""What one rewind adds to the numbers of events."""
_CREATED, _QUEUED, _IN_PROGRESS, _ITEM_ADDED, _PART_ADDED = range(5)
_LAST_EVENT: Final = {"completed": "response.completed", "failed": "response.failed"}
"""The type of the last event by the response's status. Of a cancelled response there is no event but incomplete."""

Event = dict[str, Any]


class Rewound(Exception):
    """The output that the reader holds is no longer the job's output."""


class Place(NamedTuple):
    """A reader's place among the events: all up to and with `starting_after` are known to it."""

    starting_after: int = -1
    """The number of an event, -1 before the first one."""

    @property
    def epoch(self) -> int:
        """The number of rewinds that the reader's output has seen."""
        return max(self.starting_after, 0) // EPOCH

    @property
    def offset(self) -> int:
        """The size of the output that the reader holds, in bytes. It counts the closing events as bytes."""
        return max(0, self.starting_after % EPOCH - _PART_ADDED) if self.starting_after >= 0 else 0


class ResponseEvents:
    """Turns the output of a job into the events of its response that follow a place."""

    def __init__(self, job: llm_pb2.JobRequest, status: llm_pb2.JobStatus, place: Place, rewinds: int = 0) -> None:
        """`status` is any status of the job, `rewinds` the number of rewinds, 0 while it is not known."""
        self._job = job
        self._accepted = llm_pb2.JobStatus(
            workflow_id=status.workflow_id, create_time=status.create_time, state=llm_pb2.JOB_STATE_QUEUED
        )
        self._base = rewinds * EPOCH
        self._known = place.starting_after - self._base
        self.last_number = place.starting_after
        """The number of the last event."""

    def begin(self) -> Iterator[Event]:
        """Yield the events of a response whose job was accepted."""
        for number, word in ((_CREATED, "created"), (_QUEUED, "queued")):
            yield from self._snapshot(number, word)

    def started(self) -> Iterator[Event]:
        """Yield the events once a worker has the job."""
        if self._known < _IN_PROGRESS:
            self._accepted.state = llm_pb2.JOB_STATE_RUNNING
        yield from self._snapshot(_IN_PROGRESS, "in_progress")

    def text(self, delta: llm_pb2.OutputDelta) -> Iterator[Event]:
        """Yield the events of new output. Raises Rewound."""
        if delta.rewind:
            raise Rewound
        if not delta.text:
            return
        yield from self.started()
        yield from self._item_added()
        end = delta.offset + len(delta.text.encode())
        logprobs = [
            {name: value for name, value in token.items() if name != "bytes"} for token in logprobs_of(delta.logprobs)
        ]
        yield from self._event(
            _PART_ADDED + end, "output_text.delta", content_index=0, delta=delta.text, logprobs=logprobs
        )

    def end(self, ending: Ending) -> Iterator[Event]:
        """Yield the last events, once all output has come."""
        status, result = ending
        yield from self.started()
        word = response_status(status, result)
        size = len(result.output.encode())
        if has_item(word, result.output):
            yield from self._item_added()
            part, item = text_part(result), message_item(status, result)
            done = {"content_index": 0, "text": result.output, "logprobs": part["logprobs"]}
            yield from self._event(_PART_ADDED + size + 1, "output_text.done", **done)
            yield from self._event(_PART_ADDED + size + 2, "content_part.done", content_index=0, part=part)
            yield from self._event(_PART_ADDED + size + 3, "output_item.done", item=item)
        last = _LAST_EVENT.get(word, "response.incomplete")
        response = response_object(self._job, status, result)
        yield from self._numbered(_PART_ADDED + size + 4, {"type": last, "response": response})

    def rewound(self) -> Event:
        """Return the event that ends a stream whose output was replaced. Its number is that of the last event."""
        return {
            "type": "error",
            "code": "output_replaced",
            "message": "the job has started over and its output differs: drop the text, and retrieve the response",
            "param": None,
            "sequence_number": max(0, self.last_number),
        }

    def _snapshot(self, number: int, word: str) -> Iterator[Event]:
        if self._known < number:
            response = response_object(self._job, self._accepted)
            yield from self._numbered(number, {"type": f"response.{word}", "response": response})

    def _item_added(self) -> Iterator[Event]:
        if self._known >= _PART_ADDED:
            return
        id_ = item_id(self._accepted)
        item = {"id": id_, "type": "message", "role": "assistant", "status": "in_progress", "content": []}
        yield from self._event(_ITEM_ADDED, "output_item.added", item=item)
        part = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
        yield from self._event(_PART_ADDED, "content_part.added", content_index=0, part=part)

    def _event(self, number: int, kind: str, **members: Any) -> Iterator[Event]:
        """Yield an event about the one item of output."""
        about = {"output_index": 0, **members}
        if "item" not in members:
            about["item_id"] = item_id(self._accepted)
        yield from self._numbered(number, {"type": f"response.{kind}", **about})

    def _numbered(self, number: int, event: Event) -> Iterator[Event]:
        if number > self._known:
            self._known = number
            self.last_number = self._base + number
            yield {**event, "sequence_number": self.last_number}


def ended_events(job: llm_pb2.JobRequest, ending: Ending, place: Place) -> Iterator[Event]:
    """Yield the events of a response that has ended, those after a place.

    A reader whose output was replaced meanwhile gets an error.
    """
    status, result = ending
    metadata = result.metadata
    output = result.output.encode()
    events = ResponseEvents(job, status, place, metadata.rewinds)
    if place.starting_after >= 0 and place.epoch != metadata.rewinds:
        if place.epoch > metadata.rewinds or place.offset > metadata.lowest_rewind_offset:
            yield events.rewound()
            return
        # The output up to the lowest rewind is the same in each epoch.
        moved = Place(place.starting_after + (metadata.rewinds - place.epoch) * EPOCH)
        events = ResponseEvents(job, status, moved, metadata.rewinds)
    yield from events.begin()
    start = min(place.offset, len(output))
    while 0 < start < len(output) and output[start] & 0xC0 == 0x80:
        start -= 1
    if start < len(output):
        missing = llm_pb2.OutputDelta(offset=start, text=output[start:].decode())
        missing.logprobs.extend(token for token in result.logprobs if start <= token.offset < len(output))
        yield from events.text(missing)
    yield from events.end(ending)
