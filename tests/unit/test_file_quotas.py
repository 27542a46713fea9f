"""The quotas of files at several gateways, which share a ledger."""

import asyncio
import dataclasses
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, cast

import pytest
from google.rpc import code_pb2, error_details_pb2
from opentelemetry.metrics import NoOpMeter
from temporalio.testing import ActivityEnvironment

from llm_pb import common_pb2, file_pb2, internal_pb2
from services.gateway.errors import ApiError
from services.gateway.files import quotas
from services.gateway.files.produced import ProducedFiles
from services.gateway.files.quotas import FileQuotas
from services.gateway.files.reader import FileReader
from services.gateway.metrics import GatewayMetrics
from services.gateway.pipelines.texts import PipelineTexts
from services.gateway.settings import GatewaySettings
from services.gateway.tenants import TenantSettings
from store.encrypted import open_store
from store.settings import StoreSettings
from workflows.counted_files import CountedFiles


class Ledger:
    """Temporal's client with the ledger of one tenant, and the files that Temporal lists."""

    def __init__(self, files: CountedFiles | None = None) -> None:
        self._files = files or CountedFiles()
        self.listed = list[file_pb2.File]()
        self.updates = 0
        self.concurrent = 0
        self.most = 0

    def get_workflow_handle(self, _: str) -> "Ledger":
        return self

    async def execute_update(
        self, _: str, request: internal_pb2.CountFilesRequest, **__: Any
    ) -> internal_pb2.CountFilesResponse:
        self.updates += 1
        self.concurrent += 1
        self.most = max(self.most, self.concurrent)
        await asyncio.sleep(0)
        self.concurrent -= 1
        return self._files.count(request, "ledger", datetime.now(UTC))

    async def start_workflow(self, _: str, record: internal_pb2.FileRecord, **__: Any) -> None:
        self.listed.append(record.file)

    async def find(self, _: str) -> None:
        return None

    async def all_of(self, _: str) -> AsyncIterator[file_pb2.File]:
        for file in self.listed:
            yield file


def gateway(ledger: Ledger, **limits: int) -> FileQuotas:
    tenants = {"acme": TenantSettings(**limits)}
    return FileQuotas(
        cast("Any", ledger), "queue", cast("FileReader", ledger), tenants, GatewayMetrics(NoOpMeter("test"), tenants)
    )


async def test_a_file_that_one_gateway_has_deleted_is_free_at_another_at_once() -> None:
    """The other one knows from the ledger that the file was taken, and has to ask it whether the file is gone."""
    ledger = Ledger()
    one, other = (gateway(ledger, max_files=1) for _ in range(2))
    await one.take("acme", "a", 5, 1)
    with pytest.raises(ApiError):
        await other.take("acme", "b", 5, 1)
    await one.give_back("acme", "a", 1)
    await other.take("acme", "b", 5, 1)
    with pytest.raises(ApiError):
        await one.take("acme", "c", 5, 1)


async def test_a_file_that_a_pipeline_has_written_counts_no_more_once_it_is_deleted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was counted before its content was stored, and created afterwards."""
    monkeypatch.setenv("STORE_URL", tmp_path.as_uri())
    ledger = Ledger()
    one, other = (gateway(ledger, max_files=1) for _ in range(2))
    reader = cast("FileReader", ledger)
    files = ProducedFiles(cast("Any", ledger), reader, GatewaySettings(), None)
    texts = PipelineTexts(reader, files, one, open_store(StoreSettings(), None))
    environment = ActivityEnvironment()
    environment.info = dataclasses.replace(environment.info, workflow_id="llmpipe--acme-u-r")
    file = await environment.run(
        texts.write_text, internal_pb2.WriteTextRequest(user_id="u", path="essay", text="1", media_type="text/plain")
    )
    with pytest.raises(ApiError):
        await other.take("acme", "b", 1, 1)
    await one.give_back("acme", file.file_id, ledger.listed[0].create_time.ToNanoseconds())
    for each in (one, other):
        await each.take("acme", "b", 1, 1)


async def test_what_never_fits_is_refused_without_the_ledger() -> None:
    ledger = Ledger()
    with pytest.raises(ApiError):
        await gateway(ledger, max_file_bytes=4).take("acme", "a", 5, 1)
    assert not ledger.updates


async def test_deletions_that_come_together_take_two_updates() -> None:
    """Temporal refuses the eleventh update of a workflow that is in flight."""
    ledger = Ledger()
    one = gateway(ledger, max_files=100)
    ids = [f"file-{number}" for number in range(30)]
    await asyncio.gather(*(one.take("acme", id_, 1, 1) for id_ in ids))
    before, ledger.most = ledger.updates, 0
    await asyncio.gather(*(one.give_back("acme", id_, 1) for id_ in ids))
    assert ledger.updates - before <= 2
    assert ledger.most == 1
    await gateway(ledger, max_files=1).take("acme", "new", 1, 1)


async def test_who_only_gives_back_remembers_nothing_that_temporal_shows(monkeypatch: pytest.MonkeyPatch) -> None:
    """A gateway that removes files and serves no upload would remember each file of the tenant for ever."""
    monkeypatch.setattr(quotas, "_SHOWN_AFTER", timedelta(0))
    ledger = Ledger()
    serving, removing = (gateway(ledger, max_files=100) for _ in range(2))
    for number in range(5):
        await serving.take("acme", f"file-{number}", 1, 1)
    for number in range(3):
        await removing.give_back("acme", f"file-{number}", 1)
    known = removing._known["acme"]
    assert not known.removed
    assert not known.counted


@pytest.mark.parametrize(("first", "second"), [(1, 2), (2, 1)], ids=["", "skewed"])
async def test_a_file_that_was_uploaded_again_counts_although_its_first_one_is_gone(first: int, second: int) -> None:
    """One gateway learns that the first file is gone before another counts the second in the ledger, or afterwards.

    The clocks of the gateways may differ by more than the time between the two.
    """
    ledger = Ledger()
    one, other = (gateway(ledger, max_files=1) for _ in range(2))
    await one.take("acme", "a", 5, first)
    await other.give_back("acme", "a", first)
    await one.take("acme", "a", 5, second)
    ledger.listed = [file_pb2.File(ref=common_pb2.FileRef(file_id="a", size_bytes=5))]
    ledger.listed[0].create_time.FromNanoseconds(second)
    assert (quota := await other.of("acme")) is not None
    assert quota.used_files == 1
    await other.give_back("acme", "a", first)
    with pytest.raises(ApiError):
        await gateway(ledger, max_files=1).take("acme", "b", 5, 1)
    for each in (one, other):
        assert (quota := await each.of("acme")) is not None
        assert quota.used_files == 1


async def test_more_new_files_than_a_ledger_counts_are_refused_with_a_wait() -> None:
    full = [internal_pb2.CountedFile(file_id=f"file-{number}", size=1, version=number + 1) for number in range(12_000)]
    for file in full:
        file.count_time.GetCurrentTime()
    ledger = Ledger(CountedFiles(full, len(full)))
    one = gateway(ledger, max_files=100_000)
    with pytest.raises(ApiError) as error:
        await one.take("acme", "new", 1, 1)
    status = error.value.status
    assert status.code == code_pb2.RESOURCE_EXHAUSTED
    retry = error_details_pb2.RetryInfo()
    assert any(detail.Unpack(retry) for detail in status.details)
    assert 0 < retry.retry_delay.seconds <= 120
    await one.give_back("acme", "file-0", 1)
    await one.take("acme", "new", 1, 1)
