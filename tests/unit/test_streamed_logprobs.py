"""Every token's log probabilities reach a watcher once and in order, wherever it leaves, resumes and rewinds.

The test joins the real parts without their processes, as test_stream_cuts does.
"""

import itertools
from collections.abc import Iterable, Iterator, Sequence
from datetime import UTC, datetime

from hypothesis import given
from hypothesis import strategies as st

from feed.feed import Fence
from feed.memory import MemoryFeed
from feed.output import GeneratedOutput, read_generated_output
from feed.transcript import Transcript
from feed.writer import FeedWriter
from jobs.resume_token import ResumeToken
from llm_pb import internal_pb2, llm_pb2
from services.gateway.streams.cursor import MAX_DELTA_BYTES, Cursor
from services.gpu_worker.engines.output_text import OutputWriter
from tests.support.examples import examples
from tests.unit.test_stream_cuts import END, decode, texts, tokens_of, writer

sizes = st.lists(st.integers(1, 3), max_size=20)
stops = st.lists(texts, max_size=1)


def logprobs_of(token: int, padding: int = 0) -> llm_pb2.TokenLogprobs:
    chosen = llm_pb2.TokenLogprob(token=decode([token]) + "." * padding, logprob=-0.5)
    return llm_pb2.TokenLogprobs(chosen=chosen, top=[chosen])


def records(tokens: Sequence[int], into: OutputWriter, steps: Iterable[int]) -> Iterator[internal_pb2.TokensMade]:
    """Yield the records of an attempt that generates all of the tokens, in steps of these sizes and then one by one."""
    log = GeneratedOutput()
    left, counts = [*tokens, END], itertools.chain(steps, itertools.repeat(1))
    while left:
        step, left = left[: (count := next(counts))], left[count:]
        output = into.write(step, [logprobs_of(token) for token in step])
        made = internal_pb2.TokensMade(
            offset=len(log.text),
            text=output.text,
            token_offset=len(log.token_ids),
            token_ids=output.token_ids,
            logprobs=output.logprobs,
        )
        log.add(internal_pb2.FeedRecord(tokens_made=made))
        yield made
        if output.finish_reason is not None:
            return


def result_of(made: Iterable[internal_pb2.TokensMade]) -> llm_pb2.JobResult:
    log = GeneratedOutput()
    for record in made:
        log.add(internal_pb2.FeedRecord(tokens_made=record))
    return log.result()


def put(transcript: Transcript, made: internal_pb2.TokensMade) -> None:
    transcript.put(made.offset, made.text, made.token_offset, made.logprobs)


class Watcher:
    """A client that applies deltas as llm.proto prescribes."""

    def __init__(self) -> None:
        self.text = b""
        self.places: list[llm_pb2.TokenLogprobs] = []
        self.received: list[llm_pb2.TokenLogprobs] = []
        """What came since the last resume or rewind."""
        self.place = 0
        """The offset of that."""

    def resume(self, transcript: Transcript, digest: str | None = None) -> Cursor:
        self.received, self.place = [], len(self.text)
        return Cursor(transcript, len(self.text), digest)

    def read(self, cursor: Cursor, most: int, pieces: int = 10**6, *, final: bool = False) -> None:
        for _ in range(pieces):
            delta = cursor.take(complete=True, final=final, most=most)
            if delta is None:
                if final:
                    self._add(cursor.rest())
                return
            assert delta.rewind == (delta.offset < len(self.text))
            self.text = self.text[: delta.offset] + delta.text.encode()
            self.places = [place for place in self.places if place.offset < delta.offset or not delta.rewind]
            if delta.rewind:
                self.received, self.place = [], delta.offset
            self._add(delta.logprobs)

    def _add(self, places: Iterable[llm_pb2.TokenLogprobs]) -> None:
        self.places += places
        self.received += places


@examples(300)
@given(text=texts, cut=sizes, stop=stops, steps=sizes, data=st.data())
def test_whatever_gateways_a_watcher_crosses_it_gets_each_tokens_logprobs_once(
    text: str, cut: list[int], stop: list[str], steps: list[int], data: st.DataObject
) -> None:
    """One gateway reads each record, another one joined records after the feed has lost some, a third the result."""
    made = [*records(tokens_of(text, cut), writer(stop), steps)]
    result = result_of(made)
    assert [place.chosen.token for place in result.logprobs] == [
        decode([token]) for record in made for token in record.token_ids
    ]
    fine, settled = Transcript(), Transcript()
    settled.settle(result.output, result.logprobs)
    watcher = Watcher()
    cursor = watcher.resume(fine)
    for record in made:
        put(fine, record)
        watcher.read(cursor, data.draw(st.integers(4, 60)), data.draw(st.integers(0, 3)))
        if data.draw(st.booleans()):
            joined = Transcript()
            joined.settle(fine.data.decode(), fine.logprobs)
            cursor = watcher.resume(data.draw(st.sampled_from([fine, joined])))
            watcher.read(cursor, data.draw(st.integers(4, 60)), 1)
            cursor = watcher.resume(fine)
    watcher.read(cursor, 50, data.draw(st.integers(0, 3)))
    watcher.read(watcher.resume(data.draw(st.sampled_from([fine, settled]))), 50, final=True)
    assert watcher.text.decode() == result.output
    assert watcher.places == [*result.logprobs]


@examples(300)
@given(text=texts, other=texts, cuts=st.tuples(sizes, sizes), stop=stops, data=st.data())
def test_an_attempt_that_starts_over_leaves_no_token_of_the_earlier_one(
    text: str, other: str, cuts: tuple[list[int], list[int]], stop: list[str], data: st.DataObject
) -> None:
    """Also where it generates the same text in other tokens. A watcher that was away gets those from its place on."""
    other = data.draw(st.sampled_from([text, text + other, text[:-1] + other, other]))
    first = [*records(tokens_of(text, cuts[0]), writer(stop), [])]
    second = [*records(tokens_of(other, cuts[1]), writer(stop), [])]
    result = result_of(second)
    transcript = Transcript()
    watcher, away = Watcher(), Watcher()
    cursor, left = watcher.resume(transcript), away.resume(transcript)
    for record in [*first[: data.draw(st.integers(0, len(first)))], *second]:
        put(transcript, record)
        watcher.read(cursor, 50, data.draw(st.integers(0, 3)))
        if data.draw(st.booleans()):
            away.read(left, 50, data.draw(st.integers(0, 1)))
    transcript.settle(result.output, result.logprobs)
    watcher.read(cursor, 50, final=True)
    assert watcher.text.decode() == result.output
    assert watcher.places == [*result.logprobs]

    token = ResumeToken.parse(left.token)
    away.read(away.resume(transcript, token.digest if token else None), 50, final=True)
    assert away.text.decode() == result.output
    assert away.received == [place for place in result.logprobs if place.offset >= away.place]


async def test_tokens_that_come_together_are_records_that_a_broker_accepts() -> None:
    """A worker that falls behind takes many tokens in one step. A broker accepts a megabyte."""
    feed = MemoryFeed()
    mine = FeedWriter(feed, "key", internal_pb2.AttemptStarted(attempt=1))
    await mine.begin()
    tokens = tokens_of("漢字é" * 250, [2] * 1000)
    output = writer([]).write(tokens, [logprobs_of(token, 2000) for token in tokens])
    await mine.append(output.text, output.token_ids, output.logprobs, prompt_tokens=1, at=datetime.now(UTC))
    await feed.append("key", internal_pb2.FeedRecord(writer="end"))
    found: list[internal_pb2.FeedRecord] = []

    def take(record: internal_pb2.FeedRecord) -> bool:
        found.append(record)
        return record.writer == "end"

    await feed.read("key", take)
    assert max(record.ByteSize() for record in found) < 1_000_000
    fence = Fence()
    assert all(fence.admits(record) for record in found[:-1])
    read = await read_generated_output(feed, "key", "end")
    assert (read.whole, read.text.decode(), tuple(read.token_ids)) == (True, output.text, output.token_ids)
    assert read.logprobs == [*output.logprobs]


def test_a_reader_far_behind_catches_up_in_pieces_of_bounded_size() -> None:
    transcript = Transcript()
    tokens = tokens_of("a" * 2000, [1] * 2000)
    output = writer([]).write(tokens[:400], [logprobs_of(token, 2000) for token in tokens[:400]])
    transcript.put(0, output.text, 0, output.logprobs)
    cursor, pieces = Cursor(transcript, 0), 0
    places: list[llm_pb2.TokenLogprobs] = []
    while (delta := cursor.take(complete=True, final=False)) is not None:
        assert delta.ByteSize() < MAX_DELTA_BYTES + 20_000
        places += delta.logprobs
        pieces += 1
    assert places == [*output.logprobs]
    assert pieces > 5
