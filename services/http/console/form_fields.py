"""The fields of a form, decoded in bounded memory."""

from collections.abc import Collection
from typing import Final
from urllib.parse import unquote_to_bytes

from durable_llm.errors import Violation
from services.http.failures import bad_request

_MAX_FIELDS: Final = 100
_PIECE_BYTES: Final = 16 * 1024
"""Size of the pieces that are decoded at once: decoding one takes up to eighty times its size."""


def fields_of(data: bytes, names: Collection[str]) -> dict[str, str]:
    """Return the fields of a form by name, the lines of their texts ended by LF.

    Raises Failure, 400, for a form that cannot be read, and for fields that are not in `names` or are there twice.
    """
    parts = data.split(b"&", _MAX_FIELDS)
    if len(parts) > _MAX_FIELDS:
        raise bad_request(message=f"the form has more than {_MAX_FIELDS} fields")
    fields: dict[str, str] = {}
    wrong = []
    try:
        for name, value in (map(_decoded, part.partition(b"=")[::2]) for part in parts if part):
            if name not in names:
                wrong.append(Violation(name[:100], "is no field of this form"))
            elif name in fields:
                wrong.append(Violation(name, "is there more than once"))
            # Browsers end the lines of a text with CR LF.
            fields[name] = value.replace("\r\n", "\n")
    except UnicodeDecodeError:
        raise bad_request(message="the form cannot be read") from None
    if wrong:
        raise bad_request(*wrong)
    return fields


def _decoded(encoded: bytes) -> str:
    pieces, start = [], 0
    while start < len(encoded):
        end = start + _PIECE_BYTES
        # An escape has three bytes: none is cut.
        last = encoded.rfind(b"%", max(start, end - 2), end)
        end = end if last <= start else last
        pieces.append(unquote_to_bytes(encoded[start:end].replace(b"+", b" ")))
        start = end
    return b"".join(pieces).decode()
