"""The files that a ledger has counted recently."""

from datetime import UTC, datetime, timedelta

from llm_pb import internal_pb2
from workflows.counted_files import CountedFiles

NOW = datetime(2026, 1, 1, tzinfo=UTC)


def request(
    known: tuple[str, int], sizes: dict[str, int] | None = None, *, gone: bool = False
) -> internal_pb2.CountFilesRequest:
    files = [internal_pb2.CountedFile(file_id=id_, size=size) for id_, size in (sizes or {}).items()]
    return internal_pb2.CountFilesRequest(files=files, known_ledger=known[0], known_version=known[1], gone=gone)


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
