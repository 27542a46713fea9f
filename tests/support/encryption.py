"""Keys for tests: a key store and a keyring in a folder, and what services need to use them."""

from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

from encryption import DataKeys, Encryption
from encryption.key_store import KeyStore
from encryption.keyring import Keyring

SERVICES = ("gateway", "gpu-worker", "notifier", "codec")
BEFORE = timedelta(minutes=2)
"""How old a key has to be, that a deleted one is not taken for one that has not spread yet."""


class Keys:
    """A key store and a keyring."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "keys"
        self.store = KeyStore(self.folder)
        self._ring = folder / "keyring.json"
        self.keyring = Keyring(self._ring)
        self.store.create()
        self.keyring.turn()
        self.environment = {
            "ENCRYPTION_KEY_STORE": str(self.folder),
            "ENCRYPTION_KEYRING": str(self._ring),
        }

    @property
    def ring(self) -> str:
        """The text of the keyring's file."""
        return self._ring.read_text()

    @ring.setter
    def ring(self, text: str) -> None:
        self._ring.write_text(text)

    def for_services(self, **changes: str) -> dict[str, dict[str, str]]:
        """Return the environment of a stack's services that encrypt."""
        return {kind: {**self.environment, **changes} for kind in SERVICES}

    def data_keys(self, clock: Callable[[], datetime] = lambda: datetime.now(UTC)) -> DataKeys:
        """Return one process's view of the keys."""
        return DataKeys(self.store, self.keyring, clock)

    def encryption(self, *, write: bool = True) -> Encryption:
        """Return how one process encrypts; the part of a workflow's id before a slash is the tenant."""
        return Encryption(self.data_keys(), write, lambda id_: id_.partition("/")[0] if "/" in id_ else "")

    async def age(self, tenant: str = "") -> None:
        """Make a key that is old enough to be deleted at once."""
        await self.data_keys(lambda: datetime.now(UTC) - BEFORE).current(tenant)
