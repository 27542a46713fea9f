"""Keyed hashes of search attributes, which Temporal can only store in clear: equal values have equal hashes."""

import base64
import hashlib
import hmac
from typing import Final

from encryption.cipher import DataKey

_PREFIX: Final = "~"
"""No value of a user begins with it."""


class SearchHash:
    """Hashes the search attributes of one tenant, by HMAC-SHA256 with a key for each attribute."""

    def __init__(self, key: DataKey) -> None:
        self._key = key

    def __call__(self, attribute: str, value: str) -> str:
        """Return the hash of the attribute's value: `~` and 43 characters of base64url."""
        digest = hmac.digest(self._key.derive(f"search {attribute}"), value.encode(), hashlib.sha256)
        return _PREFIX + base64.urlsafe_b64encode(digest).decode().rstrip("=")


def is_hash(value: str) -> bool:
    """Return whether a search attribute's value is a hash."""
    return value.startswith(_PREFIX)
