"""Commands that submit, against a service of a few lines whose quota is full."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import pytest
from click.testing import CliRunner
from google.rpc import code_pb2, error_details_pb2

from durable_llm.cli._run import durable_llm
from durable_llm.cli._submitting import submitting
from durable_llm.errors import API_ERRORS, Unavailable
from llm_pb import file_pb2, llm_pb2, pipeline_pb2
from llm_pb.file_pb2_grpc import FileServiceServicer, add_FileServiceServicer_to_server
from llm_pb.llm_pb2_grpc import LlmServiceServicer, add_LlmServiceServicer_to_server
from llm_pb.pipeline_pb2_grpc import PipelineServiceServicer, add_PipelineServiceServicer_to_server
from services.gateway.errors import make_status


def refuse(context: grpc.ServicerContext, message: str, *, wait: int) -> None:
    """End a call as a quota of a tenant does that is full. Without `wait` there is no room for it ever."""
    details = [error_details_pb2.ErrorInfo(reason="QUOTA_EXCEEDED")]
    if wait:
        details.append(error_details_pb2.RetryInfo(retry_delay={"nanos": wait}))
    status = make_status(code_pb2.RESOURCE_EXHAUSTED, message, *details)
    context.set_trailing_metadata((("grpc-status-details-bin", status.SerializeToString()),))
    context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, status.message)


class Full(LlmServiceServicer, FileServiceServicer, PipelineServiceServicer):  # type: ignore[misc]  # generated
    """A service that is full for the first two calls, and takes the third one or ends with it."""

    def __init__(self) -> None:
        self._calls = 0

    def _wait(self, context: grpc.ServicerContext) -> None:
        self._calls += 1
        if self._calls <= 2:
            refuse(context, "the quota is full", wait=1000)

    def Submit(self, request: llm_pb2.SubmitRequest, context: grpc.ServicerContext) -> llm_pb2.SubmitResponse:
        self._wait(context)
        return llm_pb2.SubmitResponse(workflow_id="llmjob-a-b")

    def SubmitPipeline(
        self, request: pipeline_pb2.SubmitPipelineRequest, context: grpc.ServicerContext
    ) -> pipeline_pb2.SubmitPipelineResponse:
        self._wait(context)
        return pipeline_pb2.SubmitPipelineResponse(status=pipeline_pb2.PipelineStatus(pipeline_id="llmpipe-a-b"))

    def UploadFile(self, requests: object, context: grpc.ServicerContext) -> file_pb2.UploadFileResponse:
        self._wait(context)
        refuse(context, "there is no room", wait=0)
        raise AssertionError


@pytest.fixture
def address(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setenv("DURABLE_LLM_CONFIG", str(tmp_path / "none"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "lines.jsonl").write_bytes(b"{}")
    server, service = grpc.server(ThreadPoolExecutor(2)), Full()
    add_LlmServiceServicer_to_server(service, server)
    add_FileServiceServicer_to_server(service, server)
    add_PipelineServiceServicer_to_server(service, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    yield f"127.0.0.1:{port}"
    server.stop(None).wait()


@pytest.mark.parametrize(
    ("command", "code"),
    [
        (["submit", "--model", "docstrings", "rain"], 0),
        (["pipeline", "run", "refine", '{"models": {"writer": "docstrings"}}', "--detach"], 0),
        (["batch", "run", "lines.jsonl", "out.jsonl"], 1),
    ],
    ids=["submit", "pipeline", "batch"],
)
def test_a_command_that_waits_for_room_says_so_once(address: str, command: list[str], code: int) -> None:
    ended = CliRunner().invoke(durable_llm, [*command, "--address", address])
    assert ended.exit_code == code, ended.output
    waits = [line for line in ended.stderr.splitlines() if line.startswith("the quota is full")]
    assert len(waits) == 1, ended.stderr


def test_quiet_is_quiet(address: str) -> None:
    ended = CliRunner().invoke(durable_llm, ["submit", "--quiet", "--model", "docstrings", "x", "--address", address])
    assert (ended.exit_code, ended.stderr) == (0, "")


@pytest.mark.parametrize(
    ("reason", "said"),
    [
        ("AUDIT_UNAVAILABLE", "Submit it again with --request-id r.\n"),
        ("TEMPORAL_UNAVAILABLE", "It may have been accepted. Submit it again with --request-id r to find it.\n"),
    ],
)
def test_a_submission_that_the_gateway_refused_was_not_accepted(
    capsys: pytest.CaptureFixture[str], reason: str, said: str
) -> None:
    error = API_ERRORS[reason]("no", grpc.StatusCode.UNAVAILABLE)
    with pytest.raises(Unavailable), submitting("Submit", "r"):
        raise error
    assert capsys.readouterr().err == said
