"""The events of a response are a function of its transcript: wherever a reader left, any replica continues exactly."""

import functools
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import TypeAdapter

from llm_pb import llm_pb2
from openai_api.asked import NOTE_LABEL, Note
from openai_api.outcome import Ending
from openai_api.response_object import response_object
from services.http.openai.response_events import EPOCH, ERROR, Place, ResponseEvents, Rewound, ended_events

JOB = llm_pb2.JobRequest(
    user_id="alice", model="m", labels={NOTE_LABEL: str(Note(background=True)), "team": "x"}, prompt="Hi"
)
ENDINGS = {
    "completed": (llm_pb2.JOB_STATE_SUCCEEDED, llm_pb2.FINISH_REASON_STOP),
    "incomplete": (llm_pb2.JOB_STATE_SUCCEEDED, llm_pb2.FINISH_REASON_LENGTH),
    "failed": (llm_pb2.JOB_STATE_FAILED, llm_pb2.FINISH_REASON_ERROR),
    "cancelled": (llm_pb2.JOB_STATE_CANCELLED, llm_pb2.FINISH_REASON_CANCELLED),
}


@functools.cache
def events() -> TypeAdapter[Any]:
    """OpenAI's own types, which take a second: not every process of pytest-xdist needs them."""
    from openai.types.responses import ResponseStreamEvent

    return TypeAdapter(ResponseStreamEvent)


def ending(word: str, output: str, rewinds: int = 0, lowest: int = 0) -> Ending:
    state, reason = ENDINGS[word]
    status = llm_pb2.JobStatus(workflow_id="llmjob-alice-1", state=state)
    status.create_time.seconds = 1_764_150_000
    metadata = llm_pb2.ResultMetadata(
        prompt_tokens=3, output_tokens=4, rewinds=rewinds, lowest_rewind_offset=lowest, model="m"
    )
    return Ending(status, llm_pb2.JobResult(output=output, finish_reason=reason, metadata=metadata))


def live(pieces: list[str], end: Ending, starting_after: int = -1) -> list[dict[str, Any]]:
    """Return the events of a stream that a front reads from a gateway, which sends the output from an offset on."""
    place = Place(starting_after)
    events = ResponseEvents(JOB, end.status, place)
    found = list(events.begin())
    offset = 0
    for piece in pieces:
        size = len(piece.encode())
        if offset + size > place.offset:
            start = max(offset, place.offset)
            text = piece.encode()[start - offset :].decode()
            found += events.text(llm_pb2.OutputDelta(offset=start, text=text), 0)
        offset += size
    return found + list(events.end(end))


def text_of(events: list[dict[str, Any]]) -> str:
    return "".join(event["delta"] for event in events if event["type"] == "response.output_text.delta")


pieces = st.lists(st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=4), max_size=6)


@given(pieces, st.sampled_from(sorted(ENDINGS)), st.data())
def test_a_stream_continues_anywhere_with_exactly_the_rest(pieces: list[str], word: str, data: st.DataObject) -> None:
    end = ending(word, "".join(pieces))
    whole = live(pieces, end)
    numbers = [event["sequence_number"] for event in whole]
    assert numbers == sorted(set(numbers))
    for event in whole:
        events().validate_python(event, strict=False)
    assert text_of(whole) == end.result.output
    cut = data.draw(st.integers(0, len(whole) - 1))
    rest = whole[cut + 1 :]
    # While the job runs, at another front, the pieces are the same or others.
    assert live(pieces, end, numbers[cut]) == rest
    again = live(list("".join(pieces)), end, numbers[cut])
    # After its end.
    ended = list(ended_events(JOB, end, Place(numbers[cut])))
    for other in (again, ended):
        assert text_of(other) == text_of(rest)
        assert without_deltas(other) == without_deltas(rest)


def without_deltas(events: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [event for event in events if event["type"] != "response.output_text.delta"]


def test_the_numbers_are_those_of_the_design() -> None:
    numbered = [(event["sequence_number"], event["type"]) for event in live(["é", "b"], ending("completed", "éb"))]
    assert numbered == [
        (0, "response.created"),
        (1, "response.queued"),
        (2, "response.in_progress"),
        (3, "response.output_item.added"),
        (4, "response.content_part.added"),
        (6, "response.output_text.delta"),
        (7, "response.output_text.delta"),
        (8, "response.output_text.done"),
        (9, "response.content_part.done"),
        (10, "response.output_item.done"),
        (11, "response.completed"),
    ]


def test_a_job_without_output_has_no_item_unless_it_completed() -> None:
    assert [event["type"] for event in live([], ending("failed", ""))][-2:] == [
        "response.in_progress",
        "response.failed",
    ]
    assert live([], ending("completed", ""))[-2]["type"] == "response.output_item.done"


def test_a_reader_of_replaced_output_is_told_to_retrieve() -> None:
    end = ending("completed", "new text", rewinds=1, lowest=3)
    (error,) = ended_events(JOB, end, Place(4 + 5))
    assert (error["type"], error["sequence_number"]) == ("error", 9 + ERROR)
    (again,) = ended_events(JOB, end, Place(9 + ERROR))
    assert (again["type"], again["sequence_number"]) == ("error", 9 + 2 * ERROR)
    assert "retrieve" in error["message"]
    # What was never replaced is continued, in the numbers of the output as it is.
    rest = list(ended_events(JOB, end, Place(4 + 3)))
    assert text_of(rest) == " text"
    assert rest[0]["sequence_number"] == EPOCH + 4 + 8
    fresh = list(ended_events(JOB, end, Place()))
    assert text_of(fresh) == "new text"
    assert list(ended_events(JOB, end, Place(fresh[4]["sequence_number"]))) == fresh[5:]
    (error,) = ended_events(JOB, end, Place(2 * EPOCH + 4))
    assert error["type"] == "error"


def test_a_rewind_ends_a_running_stream() -> None:
    events = ResponseEvents(JOB, ending("completed", "").status, Place())
    list(events.text(llm_pb2.OutputDelta(text="abc"), 0))
    try:
        list(events.text(llm_pb2.OutputDelta(offset=1, text="x", rewind=True), 1))
    except Rewound:
        assert events.rewound()["sequence_number"] == 7 + ERROR
    else:
        raise AssertionError("no rewind")


def test_a_running_job_that_has_started_over_is_numbered_as_after_its_end() -> None:
    """The gateway goes back to the lowest rewind for a reader whose output may be an older one, and says the number."""
    end = ending("completed", "néw text", rewinds=1, lowest=3)
    whole = list(ended_events(JOB, end, Place()))
    events = ResponseEvents(JOB, end.status, Place())
    live = [*events.begin(), *events.text(llm_pb2.OutputDelta(text="néw"), 1)]
    held = live[-1]["sequence_number"]
    assert held == EPOCH + 4 + 4
    events = ResponseEvents(JOB, end.status, Place(held))
    repeated = llm_pb2.OutputDelta(offset=3, text="w text", rewind=True)
    rest = [*events.begin(), *events.text(repeated, 1), *events.end(end)]
    assert text_of(rest) == " text"
    assert rest == list(ended_events(JOB, end, Place(held)))
    assert rest[-1] == whole[-1]
    # A job that still notifies knows the number of its rewinds before its output is streamed.
    for place, known, rewinds in ((Place(held), 0, 2), (Place(held), 0, 0), (Place(4 + 4), 0, 1), (Place(4 + 4), 1, 1)):
        with pytest.raises(Rewound):
            list(ResponseEvents(JOB, end.status, place, known).text(repeated, rewinds))
    # What was the same in each output is continued.
    events = ResponseEvents(JOB, end.status, Place(4 + 3))
    assert list(events.text(llm_pb2.OutputDelta(offset=3, text="w"), 1))[-1]["sequence_number"] == held


def test_a_reader_continues_after_an_error() -> None:
    """Its numbers go on growing, and it holds the same output."""
    end = ending("completed", "abcdef")
    events = ResponseEvents(JOB, end.status, Place())
    before = [*events.begin(), *events.text(llm_pb2.OutputDelta(text="abc"), 0)]
    error = events.error("server_error", "the gateway does not answer")
    rest = list(ended_events(JOB, end, Place(error["sequence_number"])))
    numbers = [event["sequence_number"] for event in (*before, error, *rest)]
    assert numbers == sorted(set(numbers))
    assert text_of([*before, *rest]) == "abcdef"
    middle = rest[0]["sequence_number"]
    assert list(ended_events(JOB, end, Place(middle))) == rest[1:]


def test_a_response_has_the_form_that_clients_read() -> None:
    from openai.types.responses import Response

    for word in ENDINGS:
        end = ending(word, "text")
        response = Response.model_validate(response_object(JOB, *end), strict=False)
        assert (response.status, response.output_text, response.background) == (word, "text", True)
        assert response.metadata == {"team": "x"}
        assert response.usage is not None
        assert response.usage.total_tokens == 7
    running = llm_pb2.JobStatus(workflow_id="llmjob-alice-1", state=llm_pb2.JOB_STATE_RUNNING)
    assert response_object(JOB, running, None)["output"] == []
