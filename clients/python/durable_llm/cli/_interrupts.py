"""Ctrl-C: when it ends a wait, and when it has to wait."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

_held = False
_pending = False


def _interrupt(number: int, frame: Any) -> None:
    global _pending
    if _held and not _pending:
        _pending = True
        return
    _pending = False
    raise KeyboardInterrupt


@contextmanager
def interruptible() -> Iterator[None]:
    """Turn Ctrl-C into KeyboardInterrupt while the context is open, instead of the end of the process."""
    before = signal.signal(signal.SIGINT, _interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


@contextmanager
def held() -> Iterator[None]:
    """Hold Ctrl-C back until the context closes: what it holds happens whole. A second Ctrl-C is not held back."""
    global _held, _pending
    _held = True
    try:
        yield
    finally:
        _held = False
    if _pending:
        _pending = False
        raise KeyboardInterrupt
