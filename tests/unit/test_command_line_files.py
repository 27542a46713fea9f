"""Commands about files, against a service of a few lines."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from hashlib import sha256
from pathlib import Path
from typing import Any, Final

import grpc
import pytest
from click.testing import CliRunner
from google.rpc import code_pb2, error_details_pb2

from durable_llm.cli._run import durable_llm
from llm_pb import file_pb2
from llm_pb.file_pb2_grpc import FileServiceServicer, add_FileServiceServicer_to_server
from services.gateway.errors import make_status

_CONTENT: Final = b"{}"


class _FullStore(FileServiceServicer):  # type: ignore[misc]  # generated
    """A service whose store is full for the first two calls."""

    def __init__(self) -> None:
        self._calls = 0

    def UploadFile(self, requests: Any, context: grpc.ServicerContext) -> file_pb2.UploadFileResponse:
        self._calls += 1
        if self._calls <= 2:
            reason = error_details_pb2.ErrorInfo(reason="STORE_UNAVAILABLE")
            status = make_status(code_pb2.UNAVAILABLE, "the store takes nothing", reason)
            context.set_trailing_metadata((("grpc-status-details-bin", status.SerializeToString()),))
            context.abort(grpc.StatusCode.UNAVAILABLE, status.message)
        file = file_pb2.File(state=file_pb2.FILE_STATE_READY)
        file.ref.file_id = "file-1"
        file.ref.size_bytes = len(_CONTENT)
        file.ref.sha256 = sha256(_CONTENT).digest()
        return file_pb2.UploadFileResponse(file=file)


@pytest.fixture
def address() -> Iterator[str]:
    server = grpc.server(ThreadPoolExecutor(2))
    add_FileServiceServicer_to_server(_FullStore(), server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    yield f"127.0.0.1:{port}"
    server.stop(None).wait()


def test_an_upload_that_waits_for_the_store_says_so_once(
    address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("DURABLE_LLM_CONFIG", str(tmp_path / "none"))
    path = tmp_path / "lines.jsonl"
    path.write_bytes(_CONTENT)
    ended = CliRunner().invoke(durable_llm, ["files", "put", str(path), "--address", address])
    assert (ended.exit_code, capfd.readouterr().out) == (0, "file-1\n")
    assert [line.partition(" in ")[0] for line in ended.stderr.splitlines()] == [
        "the store takes nothing; going on at byte 0"
    ]
