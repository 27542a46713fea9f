"""Heartbeats from threads."""

import asyncio
from collections.abc import Callable
from contextvars import copy_context

from temporalio import activity


def beat_of_threads() -> Callable[[], object]:
    """Return a function that any thread of the running activity calls for a heartbeat.

    The SDK's own is for the event loop alone.
    """
    loop, context = asyncio.get_running_loop(), copy_context()
    return lambda: loop.call_soon_threadsafe(activity.heartbeat, context=context)
