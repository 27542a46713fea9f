"""The store of objects: bytes under names, written once, behind one URL.

Nobody finds an object by searching. A writer gives each object a new name that nobody can guess, and the object exists
for others only once a record in Temporal holds its StoredObject. So an attempt that dies leaves nothing that anybody
sees, and two attempts of the same work never touch each other's bytes. What no record names is swept later.

    StoreUnavailable   the store does not answer, or refuses. Another attempt may succeed; nothing is lost.
    ObjectMissing      the store answers that it has no such object.
    └── ObjectDamaged  the object that it has is shorter than its record says.
"""

import re
import secrets
from collections.abc import AsyncGenerator, AsyncIterator, Iterable
from datetime import datetime
from typing import Final, NamedTuple, Protocol

MAX_PIECE_BYTES: Final = 1024 * 1024
"""Maximum size of a piece that read() yields, and a good size for the pieces of put()."""
_NAME_BYTES: Final = 16
_PREFIX: Final = re.compile(r"(?:[A-Za-z0-9._=+~-]+/)+")


class StoreUnavailable(RuntimeError):
    """The store does not answer in time, or refuses. The message names no credential."""


class ObjectMissing(LookupError):
    """The store has no object of that name: it was removed, or it never was."""


class ObjectDamaged(ObjectMissing):
    """The store has only a part of the object. Another attempt reads no more of it."""


class StoredObject(NamedTuple):
    """An object that was written: what a record keeps of it."""

    name: str
    size: int
    """Size of the content, in bytes. An encrypted object is larger."""


class ListedObject(NamedTuple):
    """An object that the store lists."""

    name: str
    modified: datetime
    """When it was written, by the store's clock."""


class Store(Protocol):
    """A store of objects. Every method raises StoreUnavailable, after bounded retries."""

    def of_tenant(self, tenant: str) -> "Store":
        """Return the store to which a tenant's objects are written. Reading needs no tenant."""
        ...

    def new_name(self, prefix: str) -> str:
        """Return a name that nobody can guess and no object has. The prefix is one or more folders, each with a `/`."""
        ...

    async def put(self, name: str, pieces: AsyncIterator[bytes]) -> StoredObject:
        """Write an object under a name of new_name(). Its size is unknown before the last piece.

        It is visible as a whole, or not at all: an error, a cancel or the death of the process leaves nothing under the
        name. It is durable when the method returns. At most some 16 MiB of it are in memory. The time that the pieces
        take does not count as the store's. Raises what `pieces` raises.
        """
        ...

    def read(self, stored: StoredObject, start: int = 0, end: int | None = None) -> AsyncGenerator[bytes, None]:
        """Yield the content from byte `start` up to byte `end`, exclusive, in pieces of at most MAX_PIECE_BYTES.

        Raises ObjectMissing; ObjectDamaged for an object that is shorter than its record says.
        """
        ...

    async def delete(self, names: Iterable[str]) -> None:
        """Remove objects. One that is not there is no error."""
        ...

    def list(self, prefix: str) -> AsyncGenerator[ListedObject, None]:
        """Yield the objects under a prefix of folders, each with a `/`. The order is the store's."""
        ...

    async def remove_drafts(self, prefix: str, before: datetime) -> None:
        """Remove what writers that were killed have left under a prefix, if nobody has written to it since `before`.

        list() does not yield it. Of a bucket it is the parts of uploads that were not completed: only a rule of the
        bucket's lifecycle removes these.
        """
        ...


def random_name(prefix: str, ending: str = "") -> str:
    """Return a name for new_name(). Raises ValueError for a prefix that is no folders."""
    if not _PREFIX.fullmatch(prefix) or "./" in prefix:
        raise ValueError(f"{prefix!r} is no prefix of an object's name")
    return f"{prefix}{secrets.token_hex(_NAME_BYTES)}{ending}"
