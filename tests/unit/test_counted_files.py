"""The files that a ledger has counted recently."""

from datetime import UTC, datetime, timedelta

import pytest

from llm_pb import internal_pb2
from workflows.counted_files import CountedFiles

NOW = datetime(2026, 1, 1, tzinfo=UTC)


def request(
    known: tuple[str, int], sizes: dict[str, int] | None = None, *, gone: bool = False
) -> internal_pb2.CountFilesRequest:
    files = [internal_pb2.CountedFile(file_id=id_, size=size) for id_, size in (sizes or {}).items()]
    return internal_pb2.CountFilesRequest(files=files, known_ledger=known[0], known_version=known[1], gone=gone)


def created_at(time: datetime, asked: internal_pb2.CountFilesRequest) -> internal_pb2.CountFilesRequest:
    for file in asked.files:
        file.create_time.FromDatetime(time)
    return asked


def sizes_of(response: internal_pb2.CountFilesResponse) -> dict[str, int | None]:
    return {file.file_id: None if file.gone else file.size for file in response.files}


def test_of_two_gateways_that_know_the_same_the_first_is_accepted() -> None:
    files = CountedFiles()
    first = files.count(request(("ledger", 0), {"a": 1, "b": 2}), "ledger", NOW)
    assert (first.counted, first.version) == (True, 2)
    second = files.count(request(("ledger", 0), {"c": 3}), "ledger", NOW)
    assert (second.counted, second.version, sizes_of(second)) == (False, 2, {"a": 1, "b": 2})
    again = files.count(request(("ledger", 2), {"c": 3}), "ledger", NOW)
    assert (again.counted, again.version, sizes_of(again)) == (True, 3, {"c": 3})


def test_a_file_that_is_gone_counts_no_more_whatever_the_gateway_knows() -> None:
    files = CountedFiles()
    files.count(request(("ledger", 0), {"a": 1}), "ledger", NOW)
    gone = files.count(request(("ledger", 0), {"a": 0}, gone=True), "ledger", NOW)
    assert (gone.counted, sizes_of(gone)) == (True, {"a": None})


def test_a_gateway_that_knows_another_ledger_gets_all_of_this_one() -> None:
    files = CountedFiles()
    files.count(request(("ledger", 0), {"a": 1}), "ledger", NOW)
    answer = files.count(request(("terminated", 1), {"b": 1}), "ledger", NOW)
    assert (answer.counted, answer.ledger, sizes_of(answer)) == (False, "ledger", {"a": 1})


def test_a_run_continues_with_the_files_of_the_last_minutes() -> None:
    """Temporal lists the others."""
    files, state = CountedFiles(), internal_pb2.LedgerState()
    files.count(request(("ledger", 0), {"old": 1}), "ledger", NOW)
    files.count(request(("ledger", 1), {"new": 2}), "ledger", NOW + timedelta(minutes=1))
    files.save(state)
    answer = CountedFiles(state.files, state.files_version).count(
        request(("ledger", 0)), "ledger", NOW + timedelta(minutes=2, seconds=30)
    )
    assert (answer.version, sizes_of(answer)) == (2, {"new": 2})


def test_files_that_come_and_go_fit_into_the_input_of_the_next_run() -> None:
    """Temporal takes 2 MB. Three hundred a second are more than that after two minutes."""
    files, state, known = CountedFiles(), internal_pb2.LedgerState(), 0
    for second in range(60):
        now = NOW + timedelta(seconds=second)
        sizes = {f"file-{'x' * 60}{second:03}{number:03}": 2**40 for number in range(300)}
        counted = files.count(created_at(now, request(("ledger", known), sizes)), "ledger", now)
        assert counted.counted
        gone = created_at(now, request(("ledger", counted.version), sizes, gone=True))
        known = files.count(gone, "ledger", now).version
    files.save(state)
    assert all(file.HasField("create_time") for file in state.files)
    assert 500_000 < state.ByteSize() < 1_700_000
    assert state.files[-1].version == known, "the last ones are kept"


@pytest.mark.parametrize("earlier", [NOW - timedelta(minutes=1), NOW + timedelta(minutes=1)], ids=["", "skewed"])
def test_what_says_that_an_earlier_file_is_gone_does_not_count_for_a_later_one(earlier: datetime) -> None:
    """The clocks of the gateways that have created the two may differ by more than the time between them."""
    files = CountedFiles()

    def about(created: datetime, *, gone: bool = False) -> internal_pb2.CountFilesRequest:
        return created_at(created, request(("ledger", 0), {"a": 1}, gone=gone))

    assert files.count(about(NOW), "ledger", NOW).counted
    assert sizes_of(files.count(about(earlier, gone=True), "ledger", NOW)) == {"a": 1}
    assert sizes_of(files.count(about(NOW, gone=True), "ledger", NOW)) == {"a": None}
