"""What a provider answers, as errors of jobs. Its own words may hold the prompt or a key, so no error has them."""

import contextlib
import math
import re
from collections.abc import AsyncIterator, Mapping
from datetime import UTC, datetime, timedelta
from email.utils import parsedate_to_datetime
from typing import Any, Final

import openai

from jobs.errors import MAX_RETRY_AFTER, EngineFailed, JobError, PromptTooLong, UnsupportedParams

_NAME: Final = re.compile(r"[A-Za-z0-9_.\[\]-]{1,64}")


@contextlib.asynccontextmanager
async def as_job_errors() -> AsyncIterator[None]:
    """Raise what the provider answers as a JobError, without its cause: Temporal keeps the words of causes."""
    try:
        yield
    except openai.APIStatusError as error:
        raise _job_error(error) from None
    except openai.APIConnectionError as error:
        if isinstance(error.__cause__, JobError):
            raise error.__cause__ from None
        raise EngineFailed(f"the provider cannot be reached: {type(error.__cause__ or error).__name__}") from None
    except JobError:
        raise
    except Exception as error:  # noqa: BLE001  # whatever the transport raises, this generation ends, not the engine
        raise EngineFailed(f"the provider's stream broke: {type(error).__name__}") from None


def name_in(value: object) -> str:
    """Return a word of a provider that is a name, such as an error's code. Empty for anything else."""
    return value if isinstance(value, str) and _NAME.fullmatch(value) else ""


def _job_error(error: openai.APIStatusError) -> JobError:
    status, code, param = error.status_code, name_in(error.code), name_in(error.param)
    said = ", ".join(f"{name} {value}" for name, value in (("code", code), ("param", param)) if value)
    answer = f"HTTP {status}{f' ({said})' if said else ''}"
    if code == "context_length_exceeded":
        return PromptTooLong("prompt and max_tokens exceed the context of the provider's model")
    if status in (400, 413, 415, 422):
        return UnsupportedParams(f"params: the provider refuses the request: {answer}")
    failed = EngineFailed(f"the provider answered {answer}")
    failed.retry_after = _retry_after(error.response.headers)
    return failed


def _retry_after(headers: Mapping[str, str]) -> timedelta | None:
    """Return the wait that a provider asks for, in seconds or as a date; None without one that is in the future."""
    said = headers.get("retry-after", "")
    try:
        seconds = float(said)
    except ValueError:
        try:
            seconds = (parsedate_to_datetime(said).astimezone(UTC) - datetime.now(UTC)).total_seconds()
        except (TypeError, ValueError, OverflowError):
            return None
    return timedelta(seconds=min(seconds, MAX_RETRY_AFTER.total_seconds())) if seconds > 0 else None


def charged(told: object, headers: Mapping[str, str]) -> int | None:
    """Return what the provider says that the output cost, in millionths, rounded up; None if it says nothing.

    OpenRouter says it in the usage: `told`; a LiteLLM proxy in a header.
    """
    said: Any = headers.get("x-litellm-response-cost", "") if told is None else told
    try:
        cost = float(said)
    except (TypeError, ValueError):
        return None
    return math.ceil(round(cost * 1_000_000, 6)) if 0 <= cost < 1_000_000 else None
