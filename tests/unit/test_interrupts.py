"""Ctrl-C at any moment: the cursor that is shown continues after exactly what was printed."""

import os
import signal
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from click.testing import CliRunner

from durable_llm.cli._batch import batch
from durable_llm.cli._connection import Connection
from durable_llm.cli._exits import Interrupted
from durable_llm.cli._follow_pipeline import follow_pipeline
from durable_llm.cli._pipelines import pipeline
from llm_pb import batch_pb2, llm_pb2, pipeline_pb2


class _Interrupting:
    """A message in whose middle Ctrl-C comes."""

    def __init__(self, message: Any, member: str) -> None:
        self._message = message
        self._member = member

    def __getattr__(self, name: str) -> Any:
        if name == self._member:
            os.kill(os.getpid(), signal.SIGINT)
        return getattr(self._message, name)


def _piece(cursor: str, text: str) -> pipeline_pb2.StreamPipelineResponse:
    delta = pipeline_pb2.StepDelta(path="write", delta=llm_pb2.OutputDelta(text=text))
    return pipeline_pb2.StreamPipelineResponse(cursor=cursor, delta=delta)


@pytest.mark.parametrize("member", ["cursor", "delta", "steps"])
def test_a_pipelines_cursor_is_that_of_what_was_printed(member: str, capfd: pytest.CaptureFixture[str]) -> None:
    def watch(*_: object) -> Iterator[Any]:
        yield _piece("1", "a")
        yield _Interrupting(_piece("2", "b"), member)
        yield _piece("3", "c")

    client: Any = SimpleNamespace(pipelines=SimpleNamespace(watch=watch))
    with pytest.raises(Interrupted) as shown:
        follow_pipeline(client, "llmpipe-a-b", ["write"])
    assert capfd.readouterr().out == "--- write\nab\n"
    assert str(shown.value).endswith("--cursor 2")


class _Client:
    """A client whose calls are functions."""

    def __init__(self, **services: Any) -> None:
        self.__dict__.update(services)

    def __enter__(self) -> "_Client":
        return self

    def __exit__(self, *_: object) -> None: ...


def test_a_pipeline_that_may_have_been_accepted_can_be_found(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def submit(*, request_id: str, **_: object) -> None:
        asked.append(request_id)
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(Connection, "connect", lambda _: _Client(pipelines=SimpleNamespace(submit=submit)))
    ended = CliRunner().invoke(pipeline, ["run", "world", '{"theme": "rain"}'])
    assert isinstance(ended.exception, Interrupted)
    assert f"--request-id {asked[0]} " in str(ended.exception)


@pytest.mark.parametrize("member", ["cursor", "items"])
def test_the_cursor_of_results_is_that_of_what_was_printed(
    member: str, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def of(number: int) -> batch_pb2.StreamBatchResultsResponse:
        item = batch_pb2.BatchItem(custom_id=f"line-{number}")
        return batch_pb2.StreamBatchResultsResponse(cursor=str(number), items=[item])

    def results(*_: object) -> Iterator[Any]:
        yield of(1)
        yield _Interrupting(of(2), member)
        yield of(3)

    monkeypatch.setattr(Connection, "connect", lambda _: _Client(batches=SimpleNamespace(results=results)))
    ended = CliRunner().invoke(batch, ["results", "llmbatch-a-b"])
    assert isinstance(ended.exception, Interrupted)
    assert str(ended.exception).endswith("--cursor 2")
    printed = capfd.readouterr().out
    assert ("line-2" in printed, "line-3" in printed) == (True, False)
