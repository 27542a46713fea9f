"""The wrapped data keys: a folder on a volume that all services share.

    <folder>/.key-store           marks a key store, so that the folder of an unmounted volume is not taken for one, and
                                  distinguishes it from others. Empty in a store of an earlier version
    <folder>/<tenant>/<YYYY-MM>   the tenant's key of the month. The tenant without a name is `_`
    <folder>/<tenant>/search      the tenant's key of search attributes, which is the same in all months
    <folder>/<tenant>/.deleted    the names of the tenant's deleted keys, one a line

A key that `.deleted` names is deleted, even if a backup brings its file back. One that is merely absent may be on
another volume or in a backup. Whoever changes a tenant's folder locks it.
A key is synced to disk before it is used: a key lost in a power failure would take all that it encrypted with it. The
file system must support hard links.
"""

import contextlib
import re
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final, NamedTuple

from pydantic import BaseModel, ConfigDict, ValidationError

from encryption import durable_file
from encryption.cipher import KeyId, checked_tenant
from encryption.errors import DamagedKey, KeysUnavailable, NoKeyStore, Unreadable

_MARK: Final = ".key-store"
_DELETED: Final = ".deleted"
_NO_TENANT: Final = "_"
_SEARCH: Final = "search"
_SLOT: Final = re.compile(rf"[0-9]{{4}}-[0-9]{{2}}|{_SEARCH}")


class Slot(NamedTuple):
    """The place of one key of a tenant."""

    tenant: str
    name: str

    @classmethod
    def of_month(cls, tenant: str, month: str) -> "Slot":
        """Return the place of the key that encrypts in the month, YYYY-MM."""
        return cls(tenant, month)

    @classmethod
    def of_search(cls, tenant: str) -> "Slot":
        """Return the place of the key that hashes search attributes."""
        return cls(tenant, _SEARCH)

    @property
    def encrypts(self) -> bool:
        """Whether the key encrypts, and does not hash."""
        return self.name != _SEARCH


class WrappedKey(BaseModel):
    """A file of the store."""

    model_config = ConfigDict(frozen=True)

    name: str
    """See KeyId."""
    wrapped: str
    """The key as the KeyWrapper returned it."""


def _damaged(path: Path) -> DamagedKey:
    return DamagedKey(f"{path} of the key store is damaged: restore it, or remove it if it is lost")


class KeyStore:
    """A folder of wrapped keys. All methods block on the file system."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def create(self) -> None:
        """Make the folder a key store. A folder that is one stays as it is. Raises NoKeyStore."""
        try:
            self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            if not (self._folder / _MARK).exists():
                durable_file.replace(self._folder / _MARK, f"{uuid.uuid4().hex}\n")
        except OSError as error:
            message = f"ENCRYPTION_KEY_STORE: {self._folder} cannot become a key store: {error.strerror}"
            raise NoKeyStore(message) from error

    def check(self) -> None:
        """Raise NoKeyStore when the folder is no key store, or cannot be read."""
        try:
            (self._folder / _MARK).stat()
        except (FileNotFoundError, NotADirectoryError) as error:
            raise NoKeyStore(
                f"ENCRYPTION_KEY_STORE: {self._folder} is no key store: mount its volume, or create a store with "
                "`python -m encryption init`"
            ) from error
        except OSError as error:
            raise NoKeyStore(
                f"ENCRYPTION_KEY_STORE: {self._folder} cannot be read: {error.strerror}; let the service's user read it"
            ) from error

    def mark(self) -> str:
        """Return what distinguishes the store from others. Raises KeysUnavailable when the folder is none now."""
        return (self._text(self._folder / _MARK) or "").strip()

    def read(self, slot: Slot) -> WrappedKey | None:
        """Return the key, None when there is none or it was deleted.

        Raises KeysUnavailable when the folder is no key store now, or cannot be read, or the file is damaged.
        """
        key = self._stored(slot)
        return None if key is not None and self.is_deleted(KeyId(slot.tenant, key.name)) else key

    def _stored(self, slot: Slot) -> WrappedKey | None:
        """Return what the key's file holds. Raises KeysUnavailable like read()."""
        text = self._text(self._path(slot))
        if text is None:
            return None
        try:
            return WrappedKey.model_validate_json(text)
        except ValidationError as error:
            raise _damaged(self._path(slot)) from error

    def is_deleted(self, key_id: KeyId) -> bool:
        """Return whether the key was deleted. Raises KeysUnavailable like read()."""
        return key_id.name in (self._text(self._folder_of(key_id.tenant) / _DELETED) or "").split()

    def add(self, slot: Slot, key: WrappedKey) -> WrappedKey:
        """Store the key and return it, or the one that another process stored first.

        Raises KeysUnavailable when the folder is no key store now, or cannot be written.
        """
        self.check()
        path = self._path(slot)
        try:
            path.parent.mkdir(mode=0o700, exist_ok=True)
            durable_file.sync_folder(self._folder)
            with durable_file.locked(path.parent):
                stored = self.read(slot)
                if stored is None:
                    # That of a deleted key, if a backup has brought one back.
                    path.unlink(missing_ok=True)
                    self._link(path, key)
                    stored = self._stored(slot)
        except OSError as error:
            raise KeysUnavailable(f"the key store cannot be written: {error}") from error
        if stored is None:
            raise KeysUnavailable(f"the keys of tenant {slot.tenant!r} are being deleted")
        return stored

    def _link(self, path: Path, key: WrappedKey) -> None:
        """Write the file unless there is one: a process of an earlier version adds one without the lock."""
        draft = durable_file.write_draft(path, key.model_dump_json())
        try:
            # Unlike a rename, a link never replaces a file.
            with contextlib.suppress(FileExistsError):
                path.hardlink_to(draft)
        finally:
            draft.unlink()
        durable_file.sync_folder(path.parent)

    def replace(self, slot: Slot, key: WrappedKey) -> bool:
        """Replace the same key, wrapped by another key-encryption key; return False if it is not there any more.

        Raises OSError, KeysUnavailable.
        """
        path = self._path(slot)
        try:
            with durable_file.locked(path.parent):
                stored = self.read(slot)
                if stored is None or stored.name != key.name:
                    return False
                durable_file.replace(path, key.model_dump_json())
        except FileNotFoundError:
            self.check()
            return False
        return True

    def slots(self) -> list[Slot]:
        """Return the places of all keys. Raises OSError."""
        return [slot for tenant in self._tenants() for slot in self._slots_of(tenant)]

    def delete(self, tenant: str) -> int:
        """Delete all keys of the tenant; return how many there were. Raises OSError, KeysUnavailable.

        Their names are recorded first, so that an interrupted deletion is completed by the next one.
        """
        folder = self._folder_of(tenant)
        if not folder.exists():
            return 0
        with durable_file.locked(folder):
            slots, names = [*self._slots_of(tenant)], []
            for slot in slots:
                # A damaged file holds no key that anything could be decrypted with.
                with contextlib.suppress(DamagedKey):
                    names += [key.name for key in [self._stored(slot)] if key is not None]
            if names:
                self._record_deleted(folder, names)
            # An interrupted write may have left a hidden file that holds a key.
            for path in [*folder.iterdir()]:
                if path.name != _DELETED:
                    path.unlink(missing_ok=True)
            durable_file.sync_folder(folder)
        return len(slots)

    def give_up(self, key_id: KeyId) -> None:
        """Record a key that the store has lost as deleted. Raises KeysUnavailable if it has the key, OSError."""
        self.check()
        folder = self._folder_of(key_id.tenant)
        folder.mkdir(mode=0o700, exist_ok=True)
        with durable_file.locked(folder):
            for slot in self._slots_of(key_id.tenant):
                stored = self._stored(slot)
                if stored is not None and stored.name == key_id.name:
                    raise KeysUnavailable(f"the data key {key_id} is in the key store")
            self._record_deleted(folder, [key_id.name])

    def _record_deleted(self, folder: Path, names: Sequence[str]) -> None:
        earlier = (self._text(folder / _DELETED) or "").split()
        durable_file.replace(folder / _DELETED, "\n".join(dict.fromkeys([*earlier, *names])) + "\n")

    def _tenants(self) -> Iterator[str]:
        for folder in sorted(self._folder.iterdir()):
            # A volume may hold folders of its own, `lost+found` for example.
            with contextlib.suppress(Unreadable):
                if folder.is_dir():
                    yield "" if folder.name == _NO_TENANT else checked_tenant(folder.name)

    def _slots_of(self, tenant: str) -> Iterator[Slot]:
        with contextlib.suppress(FileNotFoundError):
            names = sorted(path.name for path in self._folder_of(tenant).iterdir())
            yield from (Slot(tenant, name) for name in names if _SLOT.fullmatch(name))

    def _text(self, path: Path) -> str | None:
        """Return the file's text, None when there is no such file. Raises KeysUnavailable."""
        try:
            return path.read_text()
        except FileNotFoundError:
            self.check()
            return None
        except UnicodeDecodeError as error:
            raise _damaged(path) from error
        except OSError as error:
            raise KeysUnavailable(f"the key store cannot be read: {error}") from error

    def _folder_of(self, tenant: str) -> Path:
        return self._folder / (tenant or _NO_TENANT)

    def _path(self, slot: Slot) -> Path:
        return self._folder_of(slot.tenant) / slot.name
