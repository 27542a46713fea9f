"""The quotas of files: how many a tenant may have, and of what size together.

What a tenant has is read from Temporal's visibility, which shows a change after a moment. What was taken since, at any
gateway, is known to the tenant's ledger: see workflows.counted_files. So no quota is exceeded, nothing has to be given
back, and nothing is lost with a gateway.
"""

import asyncio
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from functools import partial
from typing import Final, NamedTuple

from temporalio.client import Client

from jobs.ids import files_ledger_workflow_id
from llm_pb import file_pb2, internal_pb2, llm_pb2
from runtime.group_commit import CommitError, GroupCommit, TooManyWaitingError
from runtime.shared_calls import SharedCalls
from runtime.temporal import RPC_TIMEOUT
from services.gateway.errors import exhausted, quota_exceeded, temporal_unavailable
from services.gateway.files.reader import FileReader
from services.gateway.metrics import GatewayMetrics
from services.gateway.quotas.admission import Reservation
from services.gateway.quotas.ledgers import MAX_WAITING, Ledger
from services.gateway.tenants import TenantSettings
from workflows.counted_files import created as created_at

_log = logging.getLogger(__name__)
_FRESH: Final = timedelta(seconds=5)
_WAIT: Final = timedelta(seconds=30)
"""The wait that an upload beyond a quota is asked for. Nobody knows when a file goes."""
_SHOWN_AFTER: Final = timedelta(seconds=75)
"""Time after which a look surely shows a file: its record is started within 30 s, visibility shows that within 30 s
more, and a look may be 5 s old. The ledger keeps it for longer."""
_MAX_GROUP: Final = 500
"""Maximum number of files in an update of the ledger: 50 KB."""
_UNCOUNTED: Final = "the files of the tenant cannot be counted now; call again"


class _Asked(NamedTuple):
    """A file that has, or is about to have, a size; or that is gone."""

    file_id: str
    size: int
    created: int
    """When it was created, in nanoseconds since 1970. A file that is gone may be uploaded again under its id."""


class _Counted(NamedTuple):
    """What the ledger has counted last of a file that is not gone."""

    size: int
    created: int
    """As in _Asked. 0: not known."""
    heard: float
    """The loop's time when this gateway learned of it."""


class _Refused(NamedTuple):
    """There is no room for a file."""

    quota: str
    rule: str
    never: bool = False
    """Whether there never is."""


@dataclass
class _Known:
    """What a gateway knows of a tenant's files."""

    ledger: Ledger
    takes: GroupCommit[_Asked, _Refused | timedelta | None]
    gone: GroupCommit[_Asked, None]
    listed: dict[str, _Asked] = field(default_factory=dict)
    """By id, as Temporal lists them."""
    looked_at: float | None = None
    counted: dict[str, _Counted] = field(default_factory=dict)
    """By id."""
    removed: dict[tuple[str, int], float] = field(default_factory=dict)
    """When this gateway heard that a file is gone, by its id and when it was created. 0: any of the id."""
    version: tuple[str, int] = ("", 0)
    """The ledger, and the version of it that this gateway knows."""

    def forget_shown(self) -> None:
        """Forget what the next look surely shows."""
        shown = asyncio.get_running_loop().time() - _SHOWN_AFTER.total_seconds()
        self.counted = {id_: counted for id_, counted in self.counted.items() if counted.heard > shown}
        self.removed = {file: heard for file, heard in self.removed.items() if heard > shown}


class FileQuotas:
    """How many files the tenants may have."""

    def __init__(
        self,
        client: Client,
        workflow_queue: str,
        reader: FileReader,
        tenants: Mapping[str, TenantSettings],
        metrics: GatewayMetrics,
    ) -> None:
        self._reader = reader
        self._metrics = metrics
        self._shared = SharedCalls()
        self._tenants = {
            name: tenant
            for name, tenant in tenants.items()
            if tenant.max_files is not None or tenant.max_file_bytes is not None
        }
        self._known = {
            name: _Known(
                Ledger(client, workflow_queue, files_ledger_workflow_id(name), 0),
                GroupCommit(partial(self._take, name), max_group=_MAX_GROUP, max_waiting=MAX_WAITING),
                GroupCommit(partial(self._give_back, name), max_group=_MAX_GROUP, max_waiting=MAX_WAITING),
            )
            for name in self._tenants
        }

    async def take(self, tenant: str, file_id: str, size: int, created: int) -> Callable[[], None]:
        """Count a file that has, or is about to have, a size. It may be counted already.

        `created` is the file's create_time in nanoseconds; 0 where it is not known yet.

        Returns what checks, just before the file's record is started or changed, that it still counts: it raises
        ApiError UNAVAILABLE. Raises ApiError RESOURCE_EXHAUSTED beyond a quota or too many new files in two minutes,
        UNAVAILABLE when Temporal does not list the files or the ledger does not answer.
        """
        if tenant not in self._tenants:
            return _always
        began = asyncio.get_running_loop().time()
        try:
            async with asyncio.timeout(2 * RPC_TIMEOUT.total_seconds()):
                refused = await self._known[tenant].takes.add(_Asked(file_id, size, created))
        except TooManyWaitingError:
            raise exhausted("too many uploads of the tenant wait at this gateway; call again") from None
        except (CommitError, TimeoutError) as error:
            raise temporal_unavailable(_UNCOUNTED) from error
        if isinstance(refused, timedelta):
            raise exhausted("the tenant uploads more new files than can be counted; call again", refused)
        if refused is not None:
            self._metrics.count_quota_refusal(tenant, refused.quota)
            raise quota_exceeded(tenant, refused.quota, refused.rule, None if refused.never else _WAIT)
        return Reservation(began).require_valid

    async def _take(self, tenant: str, asked: Sequence[_Asked]) -> Sequence[_Refused | timedelta | None]:
        """Count those of the files for which there is room; return why the others have none.

        Where the ledger counts none, it is the time until it does.
        """
        known = self._known[tenant]
        while True:
            sizes = await self._sizes(tenant)
            results = [self._room(tenant, sizes, one) for one in asked]
            taken = [
                one._replace(size=sizes[one.file_id]) for one, why in zip(asked, results, strict=True) if why is None
            ]
            # A refusal asks the ledger, too: another gateway may have deleted a file since.
            asks = any(why is None or not why.never for why in results)
            counted = not asks or await self._count(known, taken)
            if isinstance(counted, timedelta):
                return [counted if why is None else why for why in results]
            if counted:
                return results

    def _room(self, tenant: str, sizes: dict[str, int], asked: _Asked) -> _Refused | None:
        """Add the file to the sizes of all; return why there is no room for it."""
        limits, size = self._tenants[tenant], max(asked.size, sizes.get(asked.file_id, 0))
        others = len(sizes) - (asked.file_id in sizes)
        if limits.max_files is not None and others >= limits.max_files:
            rule = f"tenant {tenant} may have {limits.max_files} files; delete one, or call again when one has expired"
            return _Refused("max_files", rule)
        bytes_of_others = sum(sizes.values()) - sizes.get(asked.file_id, 0)
        if limits.max_file_bytes is not None and bytes_of_others + size > limits.max_file_bytes:
            rule = f"the files of tenant {tenant} may have {limits.max_file_bytes} bytes together; "
            if size > limits.max_file_bytes:
                return _Refused("max_file_bytes", f"{rule}one of {size} bytes never fits", never=True)
            return _Refused("max_file_bytes", f"{rule}delete one")
        sizes[asked.file_id] = size
        return None

    async def _count(self, known: _Known, counted: Sequence[_Asked], *, gone: bool = False) -> bool | timedelta:
        """Return whether the ledger has counted the files: not if it had counted what this gateway did not know.

        Where it has counted too many new ones, return the time until it counts again.
        """
        files = [internal_pb2.CountedFile(file_id=one.file_id, size=one.size) for one in counted]
        for file, one in zip(files, counted, strict=True):
            file.create_time.FromNanoseconds(one.created)
        ledger, version = known.version
        request = internal_pb2.CountFilesRequest(files=files, known_ledger=ledger, known_version=version, gone=gone)
        response = await known.ledger.count_files(request)
        now = asyncio.get_running_loop().time()
        # Of two answers that cross, the older one is ignored: its news are a part of the other's.
        if response.ledger != known.version[0] or response.version > known.version[1]:
            known.version = (response.ledger, response.version)
            for file in response.files:
                if file.gone:
                    known.counted.pop(file.file_id, None)
                    known.removed[file.file_id, created_at(file)] = now
                else:
                    known.counted[file.file_id] = _Counted(file.size, created_at(file), now)
        if response.HasField("retry_delay"):
            return response.retry_delay.ToTimedelta()
        return response.counted

    async def give_back(self, tenant: str, file_id: str, created: int) -> None:
        """Count a file no more that is gone. Where the ledger does not answer, it counts until Temporal lists it no
        more.

        `created` is the file's create_time in nanoseconds: one that was uploaded again under the same id counts.
        """
        if (known := self._known.get(tenant)) is not None:
            known.removed[file_id, created] = asyncio.get_running_loop().time()
            if (last := known.counted.get(file_id)) is not None and (not created or last.created in (0, created)):
                del known.counted[file_id]
            try:
                async with asyncio.timeout(RPC_TIMEOUT.total_seconds()):
                    await known.gone.add(_Asked(file_id, 0, created))
            except (TimeoutError, CommitError, TooManyWaitingError) as error:
                _log.warning("the ledger of the files of %s does not know that one is gone: %r", tenant, error)

    async def _give_back(self, tenant: str, gone: Sequence[_Asked]) -> Sequence[None]:
        known = self._known[tenant]
        await self._count(known, gone, gone=True)
        # Who serves no upload of the tenant never looks.
        known.forget_shown()
        return [None] * len(gone)

    async def of(self, tenant: str) -> llm_pb2.FilesQuota | None:
        """Return the quota of a tenant, None without one. Raises like take()."""
        if (limits := self._tenants.get(tenant)) is None:
            return None
        sizes = await self._sizes(tenant)
        quota = llm_pb2.FilesQuota(used_files=len(sizes), used_bytes=sum(sizes.values()))
        if limits.max_files is not None:
            quota.limit_files = limits.max_files
        if limits.max_file_bytes is not None:
            quota.limit_bytes = limits.max_file_bytes
        return quota

    async def _sizes(self, tenant: str) -> dict[str, int]:
        known = self._known[tenant]
        now = asyncio.get_running_loop().time()
        if known.looked_at is None or now - known.looked_at > _FRESH.total_seconds():
            await self._shared.fresh(tenant, lambda: self._look(tenant))
        known.forget_shown()
        sizes = {
            id_: file.size
            for id_, file in known.listed.items()
            if (id_, file.created) not in known.removed and (id_, 0) not in known.removed
        }
        for id_, last in known.counted.items():
            sizes[id_] = max(last.size, sizes.get(id_, 0))
        return sizes

    async def _look(self, tenant: str) -> None:
        known = self._known[tenant]
        began = asyncio.get_running_loop().time()
        found = {file.ref.file_id: _listed(file) async for file in self._reader.all_of(tenant)}
        known.listed, known.looked_at = found, began


def _always() -> None:
    """Do nothing: the tenant has no quota."""


def _listed(file: file_pb2.File) -> _Asked:
    """Return what a file has, or is to have."""
    size = max(file.committed_bytes, file.ref.size_bytes)
    return _Asked(file.ref.file_id, size, file.create_time.ToNanoseconds())
