"""The page tokens of List: Temporal's own, bound to the filters they were made for.

Temporal answers a token that it cannot read with UNKNOWN, and one made for other filters with wrong pages. A digest of
the filters in front of it tells both before Temporal is asked.
"""

import base64
import binascii
import hashlib
from collections.abc import Sequence
from typing import Final

from jobs.rules import Violation
from llm_pb import llm_pb2

_DIGEST_BYTES: Final = 8
REFUSED: Final = Violation("page_token", "must be the next_page_token of the page before, with the same filters")


def seal(request: llm_pb2.ListRequest, token: bytes | None) -> str:
    """Return the token of the page that follows this request's; empty when there is none."""
    return base64.urlsafe_b64encode(_digest(request) + token).decode() if token else ""


def unseal(request: llm_pb2.ListRequest) -> bytes | None:
    """Return Temporal's token, None for the first page. Raises ValueError for a token that seal() did not make."""
    if not request.page_token:
        return None
    try:
        data = base64.b64decode(request.page_token, altchars=b"-_", validate=True)
    except binascii.Error as error:
        raise ValueError("the page token is not base64url") from error
    if len(data) <= _DIGEST_BYTES or data[:_DIGEST_BYTES] != _digest(request):
        raise ValueError("the page token belongs to other filters")
    return data[_DIGEST_BYTES:]


async def check(request: llm_pb2.ListRequest) -> Sequence[Violation]:
    """Return what is wrong with the page token."""
    try:
        unseal(request)
    except ValueError:
        return [REFUSED]
    return []


def _digest(request: llm_pb2.ListRequest) -> bytes:
    filters = llm_pb2.ListRequest()
    filters.CopyFrom(request)
    filters.ClearField("page_size")
    filters.ClearField("page_token")
    return hashlib.sha256(filters.SerializeToString(deterministic=True)).digest()[:_DIGEST_BYTES]
