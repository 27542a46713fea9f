"""Keys for tests: a key store and a keyring in a folder, and what services need to use them."""

from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

from encryption import DataKeys, Encryption
from encryption.data_keys import RECHECK
from encryption.key_store import KeyStore
from encryption.keyring import Keyring

SERVICES = ("gateway", "gpu-worker", "notifier", "codec")


class Keys:
    """A key store and a keyring."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "keys"
        self.store = KeyStore(self.folder)
        self._ring = folder / "keyring.json"
        self.keyring = Keyring(self._ring)
        self.store.create()
        self.keyring.create()
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

    def data_keys(
        self, clock: Callable[[], datetime] = lambda: datetime.now(UTC), *, recheck: timedelta = RECHECK
    ) -> DataKeys:
        """Return one process's view of the keys."""
        return DataKeys(self.store, self.keyring, clock, recheck=recheck)

    def encryption(
        self, *, write: bool = True, patience: timedelta = timedelta(0), recheck: timedelta = RECHECK
    ) -> Encryption:
        """Return how one process encrypts. The part of a workflow's id before a slash is the tenant."""
        tenant_of = lambda id_: id_.partition("/")[0] if "/" in id_ else ""  # noqa: E731
        return Encryption(self.data_keys(recheck=recheck), write, tenant_of, patience=patience)
