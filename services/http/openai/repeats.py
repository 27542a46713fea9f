"""The request_id of a job, by which a repeated request finds the job of the first one.

An `Idempotency-Key` identifies the request. OpenAI's clients send none, only the number of the try, so a repeated try
is identified by its caller and body. In each period of ten minutes the first request with them gets a request_id that
is derived from them, and a further try within ten minutes finds it. Another first try with the same caller and body is
a job of its own with a random id. No replica needs a memory for that.
"""

import hashlib
import json
import re
import time
import uuid
from collections.abc import Mapping, Sequence
from datetime import timedelta
from typing import Any, Final, NamedTuple

from starlette.requests import Request

from jobs.ids import ID_PATTERN
from openai_api.errors import invalid

WITHIN: Final = timedelta(minutes=10)
"""Time for which a repeated try finds the job of the first one."""
_HEADER: Final = "Idempotency-Key"
_KEY: Final = _HEADER.lower()
_CONTROL: Final = re.compile(r"[\x00-\x1f\x7f]")
_TRY: Final = "x-stainless-retry-count"
_COUNT: Final = re.compile(r"[0-9]{1,9}")
_MAX_KEY: Final = 1024


class Tries(NamedTuple):
    """The parts of a request that show whether it repeats another one."""

    key: str = ""
    """The request_id that the client chose, in the form of one; empty if it chose none."""
    repeated: bool = False
    """Whether the client says that it has sent the request before."""
    counted: bool = False
    """Whether the client counts its tries."""
    digest: str = ""
    """A digest of caller, path and body, if the client counts its tries: without that nothing is compared.

    The caller's credential, which nobody can guess, protects the prompt in it.
    """

    @classmethod
    def of(cls, request: Request, body: Mapping[str, Any]) -> "Tries":
        """Return these parts of a request. Raises InvalidBody for an invalid key."""
        if key := request_id_of(request):
            return cls(key)
        count = request.headers.get(_TRY, "")
        if _COUNT.fullmatch(count) is None:
            return cls()
        said = [request.headers.get("authorization", ""), request.scope["path"], json.dumps(body, sort_keys=True)]
        return cls("", repeated=int(count) > 0, counted=True, digest=_sha256("\0".join(said)))

    def may_follow(self, *, stream: bool) -> bool:
        """Return whether another try of the request may want its job when this one's client has gone.

        A client that counts its tries repeats a stream only if it has received nothing of it.
        """
        return bool(self.key) or self.repeated or (self.counted and not stream)

    def request_ids(self) -> tuple[str, str]:
        """Return the request_ids that are derived from caller and body, in this period and in the one before."""
        period = int(time.time() // WITHIN.total_seconds())
        this, before = (f"repeat-{_sha256(f'{self.digest} {number}')[:32]}" for number in (period, period - 1))
        return this, before


def request_id_of(request: Request) -> str:
    """Return the key that a request has, in the form of a request_id; empty without one. Raises InvalidBody."""
    if not (keys := request.headers.getlist(_KEY)):
        return ""
    key = _checked(keys)
    return key if ID_PATTERN.fullmatch(key) else f"sha256-{_sha256(key)}"


def _checked(keys: Sequence[str]) -> str:
    """Return the one key. Raises InvalidBody."""
    if len(keys) > 1:
        raise invalid(_HEADER, "must be sent once")
    if not 1 <= len(keys[0]) <= _MAX_KEY:
        raise invalid(_HEADER, f"must have 1 to {_MAX_KEY} characters")
    if _CONTROL.search(keys[0]) is not None:
        raise invalid(_HEADER, "must not hold control characters")
    return keys[0]


def random_id() -> str:
    """Return a request_id that no other request has."""
    return uuid.uuid4().hex


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
