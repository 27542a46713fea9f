"""The JSON body and the query of a request, read within bounds."""

import asyncio
import email.message
from collections.abc import Collection
from http import HTTPStatus
from typing import Any, Final

from starlette.requests import ClientDisconnect, Request

from durable_llm.errors import Violation
from jobs import strict_json
from services.http.failures import Failure, bad_request
from services.http.settings import HttpSettings

_DRAINED: Final = 4
"""A body that is too large is read and dropped, up to this many times the limit."""
_JSON: Final = "application/json"
_CLOSE: Final = {"Connection": "close"}
"""Ends a connection whose request was not read to its end."""


async def read_object(request: Request, settings: HttpSettings, *, optional: bool = False) -> dict[str, Any]:
    """Return the JSON object that is the body of a request. An `optional` body may be missing: that is {}.

    Raises Failure: 415 for another type than JSON, as the form of a foreign page has, for another charset than UTF-8
    and for a compressed body; 413 for a body over the limit; 408 for one that does not come in time; 400 for one that
    is no JSON, has a key twice or holds too many values.
    """
    kind = _media_type(request)
    data = await read_body(request, settings)
    if not data and optional and kind in ("", _JSON):
        return {}
    if kind != _JSON:
        raise Failure(HTTPStatus.UNSUPPORTED_MEDIA_TYPE, "the body must be JSON, with Content-Type: application/json")
    try:
        return strict_json.read_object(data)
    except strict_json.RepeatedKeys as error:
        raise bad_request(*(Violation(*violation) for violation in error.violations)) from None
    except strict_json.NoObject as error:
        raise bad_request(message=f"the body {error}") from None


def query_of(request: Request, names: Collection[str], *, repeated: Collection[str] = ()) -> dict[str, list[str]]:
    """Return the values of the query's parameters by name. Those in `repeated` may occur more than once.

    Raises Failure, 400, which names every other parameter.
    """
    values: dict[str, list[str]] = {}
    for name, value in request.query_params.multi_items():
        values.setdefault(name, []).append(value)
    wrong = [Violation(name, "is no parameter of this path") for name in values if name not in {*names, *repeated}]
    wrong += [
        Violation(name, "is there more than once")
        for name, found in values.items()
        if name in names and name not in repeated and len(found) > 1
    ]
    if wrong:
        raise bad_request(*wrong[:100])
    return values


def require_no_coding(request: Request) -> None:
    """Raise Failure, 415, for a body that is compressed."""
    coding = request.headers.get("content-encoding", "identity")
    if coding.strip().lower() not in ("", "identity"):
        words = f"the body must be sent as it is, without Content-Encoding: {coding}"
        raise Failure(HTTPStatus.UNSUPPORTED_MEDIA_TYPE, words, headers={"Accept-Encoding": "identity", **_CLOSE})


def _media_type(request: Request) -> str:
    """Return the media type of the body, empty if the request names none. Raises Failure, 415."""
    require_no_coding(request)
    if (whole := request.headers.get("content-type", "")) == _JSON:
        # What nearly all clients send. The parser of parameters takes a good part of a millisecond.
        return whole
    sent = email.message.Message()
    sent["content-type"] = whole
    charset = str(sent.get_param("charset", "utf-8"))
    if charset.lower() not in ("utf-8", "utf8"):
        raise Failure(HTTPStatus.UNSUPPORTED_MEDIA_TYPE, f"the body must be in UTF-8, not {charset}", headers=_CLOSE)
    return str(sent["content-type"]).partition(";")[0].strip().lower()


async def read_body(request: Request, settings: HttpSettings) -> bytes:
    """Return the body of a request. Raises Failure: 413 for one over the limit, 408 for one that comes too late."""
    length = int(request.headers.get("content-length", "0"))
    # A client that asks before it sends the body need not send it. Another one may read the answer only after it has
    # sent everything.
    if length > (settings.max_body_bytes if "expect" in request.headers else _DRAINED * settings.max_body_bytes):
        raise _too_large(settings)
    data, size = bytearray(), 0
    try:
        async with asyncio.timeout(settings.request_timeout.total_seconds()):
            async for piece in request.stream():
                size += len(piece)
                if size <= settings.max_body_bytes:
                    data += piece
                elif size > _DRAINED * settings.max_body_bytes:
                    raise _too_large(settings)
    except TimeoutError:
        seconds = f"{settings.request_timeout.total_seconds():g}"
        raise Failure(HTTPStatus.REQUEST_TIMEOUT, f"the body has not come within {seconds} s", headers=_CLOSE) from None
    except ClientDisconnect:
        raise bad_request(message="the client has gone") from None
    if size > settings.max_body_bytes:
        raise _too_large(settings)
    return bytes(data)


def _too_large(settings: HttpSettings) -> Failure:
    message = f"the body has more than {settings.max_body_bytes} bytes"
    return Failure(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, message, headers=_CLOSE)
