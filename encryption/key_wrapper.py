"""The seam to the holder of key-encryption keys."""

from typing import Protocol


class KeyWrapper(Protocol):
    """Wraps data keys with a key-encryption key, which never leaves it."""

    @property
    def is_paid(self) -> bool:
        """Whether each call is paid for."""
        ...

    async def wrap(self, secret: bytes, context: str) -> str:
        """Return the secret wrapped with the current key-encryption key, whose id the result holds.

        `context` is authenticated: unwrap needs the same. Raises KeysUnavailable.
        """
        ...

    async def unwrap(self, wrapped: str, context: str) -> bytes:
        """Return the secret, unwrapped with the key-encryption key that wrapped it.

        Raises KeysUnavailable when that key is unavailable or refuses. Never Unreadable: an operator can restore it.
        """
        ...
