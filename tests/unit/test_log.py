"""The log of a process that encrypts content."""

import io
import json
import logging
from collections.abc import Iterator

import pytest
from temporalio import activity
from temporalio.exceptions import ApplicationError

from runtime import log, temporal_log

MARKER = "xyzzy-marker"


@pytest.fixture
def lines(monkeypatch: pytest.MonkeyPatch) -> Iterator[io.StringIO]:
    """The log of this process, redacted while the test runs."""
    root, library = logging.getLogger(), logging.getLogger(activity.logger.logger.name)
    monkeypatch.setattr(root, "handlers", [])
    monkeypatch.setattr(library, "filters", [])
    log.configure(log.LogSettings(format="json"))
    temporal_log.configure()
    text = io.StringIO()
    (handler,) = root.handlers
    assert isinstance(handler, logging.StreamHandler)
    handler.setStream(text)
    yield text
    logging.captureWarnings(False)


def fail(kind: type[Exception]) -> None:
    try:
        try:
            raise ValueError(f"cause {MARKER}")
        except ValueError as cause:
            raise kind(f"error {MARKER}") from cause
    except kind as error:
        activity.logger.logger.warning("Completing activity as failed", exc_info=True)
        logging.getLogger("any").exception(f"Handling failed, original error: {error}")


@pytest.mark.parametrize("kind", [RuntimeError, ApplicationError])
@pytest.mark.parametrize("redacted", [False, True])
def test_messages_of_errors_are_left_out(lines: io.StringIO, kind: type[Exception], redacted: bool) -> None:
    """Their types and where they were raised stay."""
    if redacted:
        log.redact_errors()
    fail(kind)
    failed, original = map(json.loads, lines.getvalue().splitlines())
    assert (MARKER in lines.getvalue()) != redacted
    assert failed["message"].startswith("Completing activity as failed")
    assert original["message"].startswith("Handling failed, original error: ")
    for name in (kind.__name__, "ValueError", "in fail"):
        assert name in original["exception"]
