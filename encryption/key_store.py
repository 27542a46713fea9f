"""Where wrapped data keys lie: a folder on a volume that all services share.

    <folder>/key-store            says that this is a key store, so that a volume that is not mounted is no empty one
    <folder>/<tenant>/<YYYY-MM>   the tenant's key of the month; `_` stands for the tenant without a name

Deleting a tenant's folder deletes its keys. What a service writes is synced to disk before it is used: a key that a
power cut loses would take everything with it that it had encrypted.
"""

import contextlib
import os
import shutil
import tempfile
from pathlib import Path
from typing import Final

from pydantic import BaseModel, ConfigDict, ValidationError

from encryption.cipher import KeyId
from encryption.errors import KeysUnavailable

_MARK: Final = "key-store"
_NO_TENANT: Final = "_"


class WrappedKey(BaseModel):
    """A file of the store."""

    model_config = ConfigDict(frozen=True)

    name: str
    """See KeyId."""
    wrapped: str
    """What the KeyWrapper returned."""


class KeyStore:
    """A folder of wrapped keys. All methods block on the file system."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def create(self) -> None:
        """Make the folder a key store, which it may be already."""
        self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        with (self._folder / _MARK).open("ab") as mark:
            os.fsync(mark.fileno())
        _sync(self._folder)

    def check(self) -> None:
        """Raise KeysUnavailable when the folder is no key store."""
        if not (self._folder / _MARK).exists():
            raise KeysUnavailable(
                f"ENCRYPTION_KEY_STORE: {self._folder} holds no key store: mount its volume, or make a new one by "
                "`python -m encryption init`"
            )

    def read(self, tenant: str, month: str) -> WrappedKey | None:
        """Return the tenant's key of the month, None when it has none.

        Raises KeysUnavailable when the folder is no key store now, or cannot be read.
        """
        try:
            text = self._path(tenant, month).read_text()
        except FileNotFoundError:
            self.check()
            return None
        except OSError as error:
            raise KeysUnavailable(f"the key store cannot be read: {error}") from error
        try:
            return WrappedKey.model_validate_json(text)
        except ValidationError as error:
            raise KeysUnavailable(f"{self._path(tenant, month)} of the key store is damaged") from error

    def add(self, key_id: KeyId, wrapped: str) -> WrappedKey:
        """Store the key as its tenant's key of the month and return it, or the one that another process stored first.

        Raises KeysUnavailable when the folder is no key store now, or cannot be written.
        """
        self.check()
        path = self._path(key_id.tenant, key_id.month)
        try:
            path.parent.mkdir(mode=0o700, exist_ok=True)
            _sync(self._folder)
            draft = _written(path, WrappedKey(name=key_id.name, wrapped=wrapped))
            with contextlib.suppress(FileExistsError):
                # Unlike a rename, a link never takes the place of a file.
                path.hardlink_to(draft)
            draft.unlink()
            _sync(path.parent)
        except OSError as error:
            raise KeysUnavailable(f"the key store cannot be written: {error}") from error
        stored = self.read(key_id.tenant, key_id.month)
        if stored is None:
            raise KeysUnavailable(f"the keys of tenant {key_id.tenant!r} are being deleted")
        return stored

    def replace(self, key_id: KeyId, wrapped: str) -> None:
        """Store the same key as another key-encryption key has wrapped it. Raises OSError."""
        path = self._path(key_id.tenant, key_id.month)
        _written(path, WrappedKey(name=key_id.name, wrapped=wrapped)).rename(path)
        _sync(path.parent)

    def keys(self) -> list[tuple[str, str]]:
        """Return tenant and month of every key. Raises OSError."""
        folders = [path for path in sorted(self._folder.iterdir()) if path.is_dir()]
        return [
            ("" if folder.name == _NO_TENANT else folder.name, path.name)
            for folder in folders
            for path in sorted(folder.iterdir())
            if not path.name.startswith(".")
        ]

    def delete(self, tenant: str) -> None:
        """Delete all keys of the tenant, which may have none. Raises OSError."""
        with contextlib.suppress(FileNotFoundError):
            shutil.rmtree(self._folder / (tenant or _NO_TENANT))
            _sync(self._folder)

    def _path(self, tenant: str, month: str) -> Path:
        return self._folder / (tenant or _NO_TENANT) / month


def _written(path: Path, key: WrappedKey) -> Path:
    """Return a new file beside the path that holds the key and is on disk."""
    handle, name = tempfile.mkstemp(prefix=".", dir=path.parent)
    with os.fdopen(handle, "w") as file:
        file.write(key.model_dump_json())
        file.flush()
        os.fsync(file.fileno())
    return Path(name)


def _sync(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
