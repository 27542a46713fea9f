"""The seam to whoever holds key-encryption keys."""

from typing import Protocol


class KeyWrapper(Protocol):
    """Wraps data keys by a key-encryption key, which never leaves it."""

    async def wrap(self, secret: bytes, context: str) -> str:
        """Return the secret wrapped by the current key-encryption key, which the result names.

        `context` is authenticated: unwrap needs the same. Raises KeysUnavailable.
        """
        ...

    async def unwrap(self, wrapped: str, context: str) -> bytes:
        """Return the secret, by whichever key-encryption key wrapped it.

        Raises KeysUnavailable when that key cannot be had now or refuses. Never Unreadable: an operator can restore it.
        """
        ...
