"""Batches: every line of an input is read once, named if it is bad, planned once, and answered once in its form."""

import json
import random
from collections.abc import Iterator, Sequence
from io import BytesIO
from itertools import pairwise
from typing import Any

import pytest
from google.protobuf.json_format import Parse
from google.protobuf.timestamp_pb2 import Timestamp
from hypothesis import given
from hypothesis import strategies as st

from batches.custom_ids import CustomIds
from batches.defaults import check_defaults
from batches.input import BatchInput, InputTooLarge
from batches.lines import Line
from batches.plan import PlanWriter, plan_range, read_count, read_records
from batches.results import LostItem, OutputLine, invalid_input, joined, to_line
from batches.rules import check_create
from batches.segments import DamagedSegment, merge, merged_pieces, read_segment, to_segment
from jobs import batches
from jobs.errors import Cancelled, EngineFailed, RunTimeout, to_status
from jobs.field_rules import Violation
from jobs.ids import batch_workflow_id, tenant_of
from llm_pb import batch_pb2, common_pb2, internal_pb2, llm_pb2
from tests.support.examples import examples

BATCH = batch_pb2.BatchRequest(
    user_id="u",
    request_id="b",
    project_id="p",
    defaults=llm_pb2.JobRequest(model="m", params=llm_pb2.SamplingParams(max_tokens=9, stop=["."])),
)
BODIES: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {"model": "m", "messages": [{"role": "user", "content": "Hi"}]},
    "/v1/responses": {"model": "m", "input": "Hi"},
    "/v1/completions": {"model": "m", "prompt": "Hi"},
}
BATCH_ID = "llmbatch-u-b"
CREATED = Timestamp(seconds=1_764_150_000)


def ours(custom_id: str, **fields: Any) -> dict[str, Any]:
    return {"request_id": custom_id, "prompt": "Hi", **fields}


def theirs(custom_id: str, url: str = "/v1/chat/completions", **more: Any) -> dict[str, Any]:
    return {"custom_id": custom_id, "method": "POST", "url": url, "body": {**BODIES[url], **more}}


def text_of(*values: Any) -> bytes:
    return b"".join((value if isinstance(value, bytes) else json.dumps(value).encode()) + b"\n" for value in values)


def read(data: bytes, *, piece: int = 1 << 16, batch: batch_pb2.BatchRequest = BATCH, **limits: int) -> list[Line]:
    return list(lines_of(BatchInput(batch, internal_pb2.BatchLimits(**limits)), data, piece))


def lines_of(source: BatchInput, data: bytes, piece: int = 1 << 16) -> Iterator[Line]:
    for start in range(0, len(data), piece):
        yield from source.feed(data[start : start + piece])
    yield from source.close()


def one(value: Any, batch: batch_pb2.BatchRequest = BATCH) -> Line:
    (line,) = read(text_of(value), batch=batch)
    return line


def problems(value: Any, batch: batch_pb2.BatchRequest = BATCH) -> dict[str, str]:
    line = one(value, batch)
    assert line.job is None
    return dict(line.problems)


def job_of(line: Line) -> llm_pb2.JobRequest:
    assert not line.problems
    assert line.job is not None
    return line.job


def test_a_line_is_a_job_of_the_batch() -> None:
    job = job_of(one(ours("a", params={"temperature": 0})))
    assert (job.user_id, job.request_id, job.project_id, job.model) == ("u", "a", "p", "m")
    assert job.job_class == common_pb2.JOB_CLASS_BACKGROUND
    assert (job.params.temperature, job.params.max_tokens, list(job.params.stop)) == (0, 9, ["."])


def test_what_a_line_sets_stands() -> None:
    line = ours("a", model="other", params={"max_tokens": 1, "stop": ["x"], "regex": "a"}, project_id="q")
    batch = batch_pb2.BatchRequest()
    batch.CopyFrom(BATCH)
    batch.defaults.params.json_schema = "{}"
    job = job_of(one(line, batch))
    assert (job.model, job.project_id, job.params.max_tokens) == ("other", "q", 1)
    assert list(job.params.stop) == ["x"]
    assert job.params.WhichOneof("structured_output") == "regex"


@pytest.mark.parametrize("url", BODIES)
def test_a_line_of_openais_form_is_a_job(url: str) -> None:
    line = one(theirs("any id: ü", url, user="end user", temperature=0.5))
    job = job_of(line)
    assert (line.custom_id, line.endpoint, line.openai) == ("any id: ü", url, True)
    assert (job.user_id, job.params.temperature, job.params.max_tokens) == ("u", 0.5, 9)
    assert job.request_id.startswith("sha256-")
    assert job_of(one(theirs("a-1", url))).request_id == "a-1"


def test_a_line_may_be_a_job_of_its_own() -> None:
    target = [{"webhook": {"url": "https://a.example/"}}]
    for value in (ours("a", notify=target), theirs("a", durable_llm={"notify": target})):
        wrong = problems(value)
        assert [rule for rule in wrong.values() if "watch" in rule]
        line = one({**value, "watch": True})
        assert line.watch
        assert len(job_of(line).notify) == 1
    assert problems(ours("a", timeouts={"queue": "9s"}))["timeouts.queue"].endswith('needs "watch": true')
    cached = ours("a", cache={"ttl": "60s"}, params={"seed": 1, "max_tokens": 9})
    assert problems(cached)["cache"].endswith('needs "watch": true')
    assert job_of(one({**cached, "watch": True})).cache.ttl.seconds == 60
    assert job_of(one(ours("a", timeouts={"run": "9s"}))).timeouts.run.seconds == 9


@pytest.mark.parametrize(
    ("value", "fields"),
    [
        (b"{", {""}),
        (b"[1]", {""}),
        (b"\xff\xfe", {""}),
        (b'{"prompt": NaN}', {""}),
        (b'{"request_id": "a", "request_id": "b"}', {"request_id"}),
        (ours("a", watch=1), {"watch"}),
        (ours("a b"), {"request_id"}),
        ({"prompt": "x"}, {"request_id"}),
        (ours("a", params={"top_p": 7, "min_tokens": 10}, nothing=1), {"nothing"}),
        (ours("a", params={"top_p": 7, "min_tokens": 10}), {"params.top_p", "params.min_tokens"}),
        (ours("a", user_id="v", job_class="JOB_CLASS_HIGH"), {"user_id", "job_class"}),
        (ours("a", prompt_file={"sha256": 1}), {"prompt_file.sha256"}),
        ({"custom_id": 5, "method": "GET", "url": "/v1/embeddings"}, {"custom_id", "method", "url"}),
        ({**theirs("a"), "more": 1}, {"more"}),
        ({**theirs("a"), "body": []}, {"body"}),
        (theirs("\ud800"), {"custom_id"}),
        (theirs("a", tools=[{}]), {"body.tools"}),
        (theirs("a", stream=True), {"body.stream"}),
        (theirs("a", "/v1/responses", background=True), {"body.background"}),
        (theirs("a", top_p=7, max_completion_tokens=0), {"body.top_p", "body.max_completion_tokens"}),
        (theirs("a", messages=[{"role": "user", "content": ""}]), {"body.messages[0].content"}),
        ({"custom_id": "a", "body": {"model": "m" * 3000}}, {"method", "url"}),
    ],
)
def test_every_bad_field_of_a_line_is_named(value: Any, fields: set[str]) -> None:
    assert set(problems(value)) == fields


def test_a_repeated_id_names_the_first_line() -> None:
    lines = read(text_of(ours("a"), theirs("b"), b"{", ours("b"), theirs("a")))
    assert [line.problems and line.problems[0][:2] for line in lines if line.custom_id] == [
        (),
        (),
        ("request_id", "must be unique: it is that of lines[1], too"),
        ("custom_id", "must be unique: it is that of lines[0], too"),
    ]


def test_ids_are_found_among_many() -> None:
    ids = CustomIds()
    assert all(ids.add(f"id {number}", number) is None for number in range(50_000))
    assert all(ids.add(f"id {number}", 0) == number for number in range(0, 50_000, 777))


def test_places_are_those_of_the_file_and_blank_lines_count() -> None:
    data = b"\n  \r\n" + text_of(ours("a")) + b"\n" + json.dumps(ours("b")).encode() + b"\r\n" + b'{"x'
    lines = read(data, piece=3)
    assert [line.index for line in lines] == [2, 4, 5]
    for line in lines:
        end = line.offset + line.length
        assert data[end : end + 1] in (b"\n", b"")
        assert b"\n" not in data[line.offset : end]
    assert [line.custom_id for line in lines] == ["a", "b", ""]


def test_limits() -> None:
    with pytest.raises(InputTooLarge, match="at most 2 lines"):
        read(text_of(ours("a"), ours("b"), ours("c")), lines=2)
    with pytest.raises(InputTooLarge, match="at most 20 bytes"):
        read(text_of(ours("a"), ours("b")), bytes=20)
    with pytest.raises(InputTooLarge, match="at least one line"):
        read(b" \n\n")
    good, long = read(text_of(ours("a"), ours("b", prompt="x" * 100)), line_bytes=60, piece=7)
    assert not good.problems
    assert long.problems[0].description.endswith("at most 60 fit")


def test_all_parts_together_run_no_more_items_than_the_batch_allows() -> None:
    for most in range(1, 300):
        batch = batch_pb2.BatchRequest(max_concurrent=most)
        for options in (internal_pb2.BatchOptions(), internal_pb2.BatchOptions(max_chunks=3)):
            each = batches.concurrent_items(options, batch)
            assert 0 < each * batches.max_chunks(options, batch) <= most
    # The least that the operator can set.
    for most in range(4, 300):
        options = internal_pb2.BatchOptions(max_watched=most)
        each = batches.concurrent_items(options, batch_pb2.BatchRequest(max_concurrent=1), watched=True)
        assert 0 < each * batches.WATCHED_CHUNKS <= most


def test_the_first_hundred_bad_fields_of_an_input_are_named() -> None:
    source = BatchInput(BATCH)
    lines = list(lines_of(source, text_of(ours("a"), *(b"{" for _ in range(150)), ours("b", params={"top_p": 7}))))
    assert (source.count, source.bad, len(lines), len(source.violations)) == (152, 151, 152, 100)
    assert source.violations[0].field == "lines[1]"


def test_defaults_are_of_no_line() -> None:
    wrong = check_defaults(llm_pb2.JobRequest(model="m", prompt="x", user_id="u"))
    assert [violation.field for violation in wrong] == ["defaults.user_id", "defaults.prompt"]


def planned(lines: Sequence[Line], in_memory: int = 1000) -> tuple[bytes, list[internal_pb2.PlanGroup]]:
    with PlanWriter(in_memory) as writer:
        for line in lines:
            writer.add(line)
        return b"".join(writer.pieces()), writer.groups


def test_a_plan_groups_models_and_shared_prefixes() -> None:
    shared = [f"{start * 40} {'ab' * 300}" for start in "xyz"]
    values = [
        ours(f"{n}", model=f"m{n % 2}", prompt=shared[n % 3] + str(n), priority=(0, 5, 2)[n % 7 % 3]) for n in range(90)
    ]
    data = text_of(*values)
    lines = read(data)
    whole, groups = planned(lines)
    assert read_count(whole[:16]) == 90
    assert [(group.model, group.first, group.count) for group in groups] == [("m0", 0, 45), ("m1", 45, 45)]
    seen = []
    for group in groups:
        offset, size = plan_range(group.first, group.count)
        records = read_records(whole[offset : offset + size])
        found = [json.loads(data[record.offset : record.offset + record.length]) for record in records]
        assert {value["model"] for value in found} == {group.model}
        runs = [(value["priority"] or 3, value["prompt"][:300]) for value in found]
        assert [priority for priority, _ in runs] == sorted(priority for priority, _ in runs)
        assert sum(one != other for one, other in pairwise(runs)) == len(set(runs)) - 1
        seen += [record.index for record in records]
    assert sorted(seen) == list(range(90))
    assert planned(lines, in_memory=7)[0] == whole


def test_watched_items_come_last_in_a_plan() -> None:
    values = [{**ours(f"{n}", model=f"m{n % 2}"), "watch": n in (0, 3, 4)} for n in range(6)]
    lines = read(text_of(*values))
    whole, groups = planned(lines)
    shown = [(group.model, group.watched, group.first, group.count) for group in groups]
    assert shown == [("m1", False, 0, 2), ("m0", False, 2, 1), ("m0", True, 3, 2), ("m1", True, 5, 1)]
    assert [record.index for record in read_records(whole[16:])][3:] in ([0, 4, 3], [4, 0, 3])
    assert planned(lines, in_memory=2)[0] == whole


def item(line: Line, state: int = llm_pb2.JOB_STATE_SUCCEEDED, **more: Any) -> batch_pb2.BatchItem:
    result = llm_pb2.JobResult(output="Hello", finish_reason=llm_pb2.FINISH_REASON_STOP)
    result.metadata.output_tokens = 1
    made = batch_pb2.BatchItem(index=line.index, custom_id=line.custom_id, result=result, end_time=CREATED, **more)
    made.state = state  # type: ignore[assignment]
    return made


def answered(line: Line, found: batch_pb2.BatchItem) -> OutputLine:
    return to_line(line, found, BATCH_ID, CREATED)


@pytest.mark.parametrize("url", BODIES)
def test_an_output_line_is_openais(url: str) -> None:
    from openai.types import Completion
    from openai.types.chat import ChatCompletion
    from openai.types.responses import Response

    kinds: tuple[Any, ...] = (ChatCompletion, Response, Completion)
    kind = dict(zip(BODIES, kinds, strict=True))[url]
    line = one(theirs("a", url))
    succeeded, data = answered(line, item(line))
    value = json.loads(data)
    assert succeeded
    assert (value["custom_id"], value["error"], value["response"]["status_code"]) == ("a", None, 200)
    assert kind.model_validate(value["response"]["body"]).usage is not None
    assert "Hello" in json.dumps(value["response"]["body"])


@pytest.mark.parametrize("url", BODIES)
def test_an_error_line_keeps_what_was_generated(url: str) -> None:
    line = one(theirs("a", url))
    failed = answered(line, item(line, llm_pb2.JOB_STATE_FAILED, error=to_status(EngineFailed("broke"))))
    value = json.loads(failed.data)
    assert not failed.succeeded
    assert value["response"]["status_code"] == 500
    assert value["response"]["body"]["error"]["code"] == "engine_failed"
    assert "Hello" in json.dumps(value["durable_llm"]["partial"])
    for state, error, code in (
        (llm_pb2.JOB_STATE_CANCELLED, Cancelled("stop"), "batch_cancelled"),
        (llm_pb2.JOB_STATE_TIMED_OUT, Cancelled("over"), "batch_expired"),
    ):
        value = json.loads(answered(line, item(line, state, error=to_status(error))).data)
        assert value["response"] is None
        assert value["error"]["code"] == code
        assert "Hello" in json.dumps(value["durable_llm"]["partial"])
    late = json.loads(answered(line, item(line, llm_pb2.JOB_STATE_TIMED_OUT, error=to_status(RunTimeout("late")))).data)
    assert late["response"]["body"]["error"]["code"] == "run_timeout"


def test_a_bad_line_is_answered_in_the_form_of_its_neighbours() -> None:
    lines = read(text_of(theirs("a"), b"{", ours("b"), b"{", theirs("a")))
    pairs = list(joined(lines, [item(lines[0]), item(lines[2])], batch_pb2.BatchItem()))
    first, second, third, fourth, fifth = (json.loads(answered(*pair).data) for pair in pairs)
    assert first["response"]["status_code"] == 200
    assert (second["response"]["status_code"], second["custom_id"]) == (400, None)
    assert third["state"] == "JOB_STATE_SUCCEEDED"
    assert fourth["error"]["details"][1]["fieldViolations"][0]["description"].startswith("is no JSON")
    assert fifth["response"]["body"]["error"]["param"] == "custom_id"


def test_a_segment_that_was_cut_or_repeats_a_line_is_refused() -> None:
    lines = read(text_of(ours("a"), ours("b")))
    data = to_segment([item(lines[1]), item(lines[0])])
    assert [found.index for found in read_segment(BytesIO(data))] == [0, 1]
    border = len(to_segment([item(lines[0])]))
    for cut in {*range(1, len(data))} - {border}:
        with pytest.raises(DamagedSegment):
            list(read_segment(BytesIO(data[:cut])))
    with pytest.raises(DamagedSegment, match="line 0 has two"):
        list(merge([read_segment(BytesIO(data)), read_segment(BytesIO(data))]))
    with pytest.raises(LostItem):
        list(joined(lines[:1], merge([read_segment(BytesIO(data))]), batch_pb2.BatchItem()))


@pytest.mark.parametrize("value", [ours("a"), theirs("a")])
def test_a_result_stands_whatever_later_rules_say_of_its_line(value: Any) -> None:
    """A later version merges what an earlier one has accepted and run."""
    line = one(value)
    refused = line.with_problem(Violation("prompt", "is not allowed any more"))
    ((_, found),) = joined([refused], [item(line)], batch_pb2.BatchItem())
    succeeded, text = answered(refused, found)
    assert succeeded
    assert "Hello" in text.decode()
    assert "not allowed" not in text.decode()


_LINES = st.sampled_from(["ours", "openai", "bad json", "bad field", "repeated", "blank", "long"])


@given(kinds=st.lists(_LINES, min_size=1, max_size=30), piece=st.integers(1, 400), seed=st.integers(0, 1 << 30))
@examples(60)
def test_output_and_errors_hold_every_line_once_and_in_order(kinds: list[str], piece: int, seed: int) -> None:
    made: dict[str, Any] = {
        "bad json": b"{]",
        "repeated": ours("same"),
        "blank": b" ",
        "long": ours("long", prompt="x" * 2000),
    }
    values = [
        made.get(
            kind,
            theirs(f"l{n}")
            if kind == "openai"
            else ours(f"l{n}", **({"params": {"top_k": -1}} if kind == "bad field" else {})),
        )
        for n, kind in enumerate(kinds)
    ]
    data, chance = text_of(*values), random.Random(seed)
    source = BatchInput(BATCH, internal_pb2.BatchLimits(line_bytes=1000))
    expected = [n for n, kind in enumerate(kinds) if kind != "blank"]
    if not expected:
        with pytest.raises(InputTooLarge):
            list(lines_of(source, data, piece))
        return
    lines = list(lines_of(source, data, piece))
    assert [line.index for line in lines] == expected
    good = [line for line in lines if line.job is not None]
    assert source.bad == len(lines) - len(good)
    whole, groups = planned(good)
    records = read_records(whole[16:])
    assert sorted(record.index for record in records) == [line.index for line in good]
    assert sum(group.count for group in groups) == len(good)

    # Some items end in some order, in segments, some of which are joined; the others never begin.
    states = (llm_pb2.JOB_STATE_SUCCEEDED, llm_pb2.JOB_STATE_FAILED)
    ended = [item(line, chance.choice(states)) for line in good if chance.random() < 0.7]
    chance.shuffle(ended)
    cuts = sorted(chance.choices(range(len(ended) + 1), k=4))
    parts = [ended[a:b] for a, b in zip([0, *cuts], [*cuts, len(ended)], strict=True)]
    segments = [to_segment(part) for part in parts]
    segments = [b"".join(merged_pieces((read_segment(BytesIO(part)) for part in segments[:3]), 50)), *segments[3:]]
    never = batch_pb2.BatchItem(state=llm_pb2.JOB_STATE_CANCELLED, error=to_status(Cancelled("stop")))
    items = merge(read_segment(BytesIO(part)) for part in segments)
    pairs = list(joined(lines_of(BatchInput(BATCH, internal_pb2.BatchLimits(line_bytes=1000)), data), items, never))

    assert [line.index for line, _ in pairs] == expected
    assert [found.index for _, found in pairs] == expected
    state_of = {found.index: found.state for found in ended}
    for line, found in pairs:
        otherwise = llm_pb2.JOB_STATE_FAILED if line.job is None else llm_pb2.JOB_STATE_CANCELLED
        assert found.state == state_of.get(line.index, otherwise)
        succeeded, text = answered(line, found)
        assert succeeded == (found.state == llm_pb2.JOB_STATE_SUCCEEDED)
        assert text.count(b"\n") == 1
        if not line.openai:
            assert Parse(text, batch_pb2.BatchItem()) == found
        else:
            assert json.loads(text)["custom_id"] == (line.custom_id or None)


@pytest.mark.parametrize("url", BODIES)
def test_a_probability_of_zero_is_a_number_of_json(url: str) -> None:
    more = {"logprobs": 1} if url == "/v1/completions" else {"top_logprobs": 1}
    more |= {"logprobs": True} if "chat" in url else {}
    line = one(theirs("a", url, **more))
    found = item(line)
    tokens = found.result.logprobs.add()
    tokens.chosen.CopyFrom(llm_pb2.TokenLogprob(token="Hello", logprob=float("-inf")))
    tokens.top.add(token="Hello", logprob=float("-inf"))
    text = answered(line, found).data.decode()
    assert "-9999.0" in text
    assert "Infinity" not in text


def test_every_bad_field_of_a_batch_is_named() -> None:
    good = batch_pb2.BatchRequest(
        user_id="u", request_id="b", input={"file_id": "file-" + "0" * 64}, job_class="JOB_CLASS_STANDARD"
    )
    assert check_create(batch_pb2.CreateBatchRequest(batch=good)) == []
    bad = batch_pb2.BatchRequest(
        user_id="-",
        project_id="a b",
        defaults={"prompt": "x"},
        window={"nanos": 999_999_999},
        job_class=9,  # type: ignore[arg-type]
        budget={"output_tokens": -1, "engine_time": {"seconds": -1}},
        max_concurrent=-1,
        max_failure_rate=float("nan"),
        notify=[{"webhook": {}}],
        labels={"": "x"},
    )
    assert [violation.field for violation in check_create(batch_pb2.CreateBatchRequest(batch=bad))] == [
        "batch.user_id",
        "batch.request_id",
        "batch.project_id",
        "batch.input.file_id",
        "batch.defaults.prompt",
        "batch.window",
        "batch.job_class",
        "batch.budget.output_tokens",
        "batch.budget.engine_time",
        "batch.max_concurrent",
        "batch.max_failure_rate",
        "batch.notify[0].webhook.url",
        'batch.labels[""]',
    ]
    assert [violation.field for violation in check_create(batch_pb2.CreateBatchRequest())] == ["batch"]


def test_a_batch_has_an_id_of_its_tenant() -> None:
    assert batch_workflow_id("user-1", "b") == "llmbatch-user--1-b"
    id_ = batch_workflow_id("user-1", "b", "a-b")
    assert id_ == "llmbatch--a--b-user--1-b"
    assert tenant_of(id_) == "a-b"
    assert len(batch_workflow_id("u" * 128, "r" * 128)) == 245


def test_what_is_said_of_a_bad_line_is_bounded() -> None:
    """Temporal holds the error of a batch, and the caller writes the names in it."""
    many = one(ours("a", messages=[{"role": "ROLE_USER"}] * 500, prompt=""))
    assert len(many.problems) == 100
    source = BatchInput(BATCH)
    list(lines_of(source, text_of(*({"é" * 100_000: 1, f"n{n}": 1} for n in range(100)))))
    error = invalid_input(source.violations)
    assert error.details[0].type_url.endswith("ErrorInfo")
    # A page of 100 batches fits a message.
    assert 0 < len(source.violations) < 100
    assert error.ByteSize() < 40 * 1024
    assert len(error.message) <= 2000


_WORDS = (
    "promptFile watch custom_id method url body input stream metadata text format stop role content max_tokens sha256"
)
_NAMES = st.sampled_from([*(field.name for field in llm_pb2.JobRequest.DESCRIPTOR.fields), *_WORDS.split()])
_SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(st.characters(), max_size=9),
    st.sampled_from([*BODIES, "POST", "m"]),
)
_JSON = st.recursive(
    _SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(_NAMES, inner, max_size=4), max_leaves=12
)


def with_body(url: str, more: dict[str, Any]) -> dict[str, Any]:
    return {**theirs("a", url), "body": {**BODIES[url], **more}}


@given(
    values=st.lists(
        st.one_of(
            st.binary(max_size=30).map(lambda data: data.replace(b"\n", b"")),
            st.dictionaries(_NAMES, _JSON, max_size=6),
            st.builds(with_body, st.sampled_from([*BODIES]), st.dictionaries(_NAMES, _JSON, max_size=4)),
        ),
        max_size=4,
    )
)
@examples(200)
def test_whatever_a_line_holds_it_is_a_job_or_is_answered_with_its_problems(values: list[Any]) -> None:
    data = text_of(ours("first"), *values)
    lines = read(data)
    assert [line.index for line in lines] == [n for n, line in enumerate(data.split(b"\n")) if line.strip()]
    for line in lines:
        assert (line.job is None) == bool(line.problems)
        found = item(line) if line.job else next(joined([line], [], batch_pb2.BatchItem()))[1]
        answer = json.loads(answered(line, found).data)
        assert answer.get("custom_id", answer.get("customId", "")) == (line.custom_id or ("", None)[line.openai])
