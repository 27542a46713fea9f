"""The bounds of attempts to sign in."""

from contextlib import AsyncExitStack

import pytest
from starlette.requests import Request

from services.http.failures import Failure
from services.http.signin.attempts import BURST, Attempts


async def test_the_refusal_says_which_bound_was_met() -> None:
    attempts, request = Attempts(), Request({"type": "http", "client": ("127.0.0.1", 1)})
    async with AsyncExitStack() as running:
        for _ in range(4):
            await running.enter_async_context(attempts.attempt(request))
        with pytest.raises(Failure, match="run at once") as refused:
            await running.enter_async_context(attempts.attempt(request))
        assert "failed" not in refused.value.message
    for _ in range(BURST):
        async with attempts.attempt(request) as attempt:
            attempt.failed = True
    with pytest.raises(Failure, match="have failed"):
        async with attempts.attempt(request):
            pass
