"""The events of a response: a pure function of what its job has generated.

Each event has a number that is the same at every replica and at any time:

    0 created, 1 queued, 2 in_progress, 3 output_item.added, 4 content_part.added
    4 + n     the output_text.delta whose text ends at byte n of the output
    5 + N     output_text.done, where N is the size of the output; then content_part.done, output_item.done, the end

Each rewind, which replaces output that readers may hold, raises all numbers by 2^36. So a number says which output its
reader holds and how much of it, and a stream that continues after a number needs no memory of the first stream.

An error ends a stream and is no event of the response. Its number is that of the event before it plus 2^30. The numbers
of a stream that continues after it are raised by 2^30, too, so that a reader sees growing numbers only.
"""

from collections.abc import Iterator
from typing import Any, Final, NamedTuple

from llm_pb import llm_pb2
from openai_api.asked import Note
from openai_api.logprobs import logprobs_of
from openai_api.outcome import Ending, response_status
from openai_api.response_object import has_item, item_id, message_item, response_object, text_part
from services.http.failures import CALL_AGAIN

EPOCH: Final = 2**36
"""Number that one rewind adds to the numbers of events."""
ERROR: Final = 2**30
"""Number that an error adds to the numbers of a reader's further events. It is larger than any output, in bytes."""
_CREATED, _QUEUED, _IN_PROGRESS, _ITEM_ADDED, _PART_ADDED = range(5)
_LAST_EVENT: Final = {"completed": "response.completed", "failed": "response.failed"}
"""The type of the last event by the response's status. A cancelled response ends as an incomplete one."""

Event = dict[str, Any]


class Rewound(Exception):
    """The output that the reader holds is no longer the job's output."""


class Place(NamedTuple):
    """A reader's place among the events: it has all up to and including `starting_after`."""

    starting_after: int = -1
    """The number of an event, -1 before the first one."""

    @property
    def epoch(self) -> int:
        """The number of rewinds that the reader's output has seen."""
        return max(self.starting_after, 0) // EPOCH

    @property
    def errors(self) -> int:
        """The number of errors that the reader has continued after."""
        return max(self.starting_after, 0) % EPOCH // ERROR

    @property
    def known(self) -> int:
        """The number of the event, without what rewinds and errors have added."""
        return self.starting_after % ERROR if self.starting_after >= 0 else -1

    @property
    def offset(self) -> int:
        """The size of the output that the reader holds, in bytes. It counts the closing events as bytes."""
        return _size_before(self.known)


class ResponseEvents:
    """Turns the output of a job into the events of its response that follow a place."""

    def __init__(self, job: llm_pb2.JobRequest, status: llm_pb2.JobStatus, place: Place, rewinds: int = 0) -> None:
        """`status` is any status of the job, `rewinds` the number of its rewinds, 0 while it is not known."""
        self._job = job
        self._unstored = Note.of(job.labels).unstored
        self._accepted = llm_pb2.JobStatus(
            workflow_id=status.workflow_id, create_time=status.create_time, state=llm_pb2.JOB_STATE_QUEUED
        )
        self._item_id = item_id(status)
        self._held_epoch = place.epoch
        self._epoch = max(place.epoch, rewinds)
        self._errors = place.errors * ERROR
        self._known = place.known
        self._resumes = place.offset > 0
        """Whether the first output is still to come to a reader who holds some."""
        self._last_number = place.starting_after

    def begin(self) -> Iterator[Event]:
        """Yield the events of a response whose job was accepted."""
        for number, word in ((_CREATED, "created"), (_QUEUED, "queued")):
            yield from self._snapshot(number, word)

    def started(self) -> Iterator[Event]:
        """Yield the events once a worker has the job."""
        if self._known < _IN_PROGRESS:
            self._accepted.state = llm_pb2.JOB_STATE_RUNNING
        yield from self._snapshot(_IN_PROGRESS, "in_progress")

    def text(self, delta: llm_pb2.OutputDelta, rewinds: int) -> Iterator[Event]:
        """Yield the events of new output. `rewinds` is the number of the job's rewinds then. Raises Rewound."""
        # The gateway cannot know which output the reader holds, and goes back to where the lowest rewind was.
        repeats = self._resumes and 0 < rewinds == self._held_epoch
        if rewinds < self._epoch or (delta.rewind and not repeats):
            raise Rewound
        self._epoch, self._resumes = rewinds, False
        end = delta.offset + len(delta.text.encode())
        delta = _after(delta, _size_before(self._known))
        if not delta.text:
            return
        yield from self.started()
        yield from self._item_added()
        logprobs = [
            {name: value for name, value in token.items() if name != "bytes"} for token in logprobs_of(delta.logprobs)
        ]
        yield from self._event(
            _PART_ADDED + end, "output_text.delta", content_index=0, delta=delta.text, logprobs=logprobs
        )

    def end(self, ending: Ending) -> Iterator[Event]:
        """Yield the last events, once all output has come."""
        status, result = ending
        self._epoch = max(self._epoch, result.metadata.rewinds)
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
        """Return the event that ends a stream whose output was replaced. Streams that continue after it end so, too."""
        remedy = "call again" if self._unstored else "retrieve the response"
        words = f"the job has started over and its output differs: drop the text, and {remedy}"
        return self.error("output_replaced", words)

    def broken(self, code: str, message: str) -> Event:
        """Return the event that ends a stream that cannot continue now. An unstored job is deleted then."""
        remedy = "call again" if self._unstored else "retrieve the response to continue"
        return self.error(code, f"{message.removesuffix(CALL_AGAIN)}; {remedy}")

    def error(self, code: str, message: str) -> Event:
        """Return the event that ends a stream early. A stream continues after it as after the event before it."""
        number = max(0, self._last_number) + ERROR
        return {"type": "error", "code": code, "message": message, "param": None, "sequence_number": number}

    def _snapshot(self, number: int, word: str) -> Iterator[Event]:
        if self._known < number:
            response = response_object(self._job, self._accepted)
            yield from self._numbered(number, {"type": f"response.{word}", "response": response})

    def _item_added(self) -> Iterator[Event]:
        if self._known >= _PART_ADDED:
            return
        item = {"id": self._item_id, "type": "message", "role": "assistant", "status": "in_progress", "content": []}
        yield from self._event(_ITEM_ADDED, "output_item.added", item=item)
        part = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
        yield from self._event(_PART_ADDED, "content_part.added", content_index=0, part=part)

    def _event(self, number: int, kind: str, **members: Any) -> Iterator[Event]:
        """Yield an event about the one item of output."""
        about = {"output_index": 0, **members}
        if "item" not in members:
            about["item_id"] = self._item_id
        yield from self._numbered(number, {"type": f"response.{kind}", **about})

    def _numbered(self, number: int, event: Event) -> Iterator[Event]:
        if number > self._known:
            self._known = number
            self._last_number = self._epoch * EPOCH + self._errors + number
            yield {**event, "sequence_number": self._last_number}


def ended_events(job: llm_pb2.JobRequest, ending: Ending, place: Place) -> Iterator[Event]:
    """Yield the events of a response that has ended, those after a place.

    A reader whose output was replaced meanwhile gets an error.
    """
    status, result = ending
    metadata = result.metadata
    output = result.output.encode()
    events = ResponseEvents(job, status, place, metadata.rewinds)
    if is_replaced(metadata, place):
        yield events.rewound()
        return
    yield from events.begin()
    whole = llm_pb2.OutputDelta(text=result.output)
    whole.logprobs.extend(token for token in result.logprobs if token.offset < len(output))
    yield from events.text(whole, metadata.rewinds)
    yield from events.end(ending)


def is_replaced(metadata: llm_pb2.ResultMetadata, place: Place) -> bool:
    """Return whether the output that a reader holds is not that of the job, which has ended."""
    # The output up to the lowest rewind is the same in each epoch.
    replaced = place.epoch < metadata.rewinds and place.offset > metadata.lowest_rewind_offset
    return replaced or place.epoch > metadata.rewinds


def _size_before(number: int) -> int:
    """Return the size of the output that a reader holds who knows the event of a number."""
    return max(0, number - _PART_ADDED)


def _after(delta: llm_pb2.OutputDelta, held: int) -> llm_pb2.OutputDelta:
    """Return what is in a piece of output after the first `held` bytes of all output."""
    if delta.offset >= held:
        return delta
    data, start = delta.text.encode(), held - delta.offset
    while 0 < start < len(data) and data[start] & 0xC0 == 0x80:
        start -= 1
    rest = llm_pb2.OutputDelta(offset=delta.offset + start, text=data[start:].decode())
    rest.logprobs.extend(token for token in delta.logprobs if token.offset >= rest.offset)
    return rest
