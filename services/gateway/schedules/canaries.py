"""The canaries: a schedule for each model, whose jobs of a few tokens show that the model answers, and how soon.

Each gateway that runs workflows brings them in line with its settings when it starts. All do the same, so it does not
matter how many there are, and which is the last one. They belong to the installation itself, to no tenant.
"""

import asyncio
import hashlib
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import timedelta
from typing import Final

from temporalio.client import Client

from encryption import Encryption
from jobs.ids import schedule_id
from jobs.options import duration
from jobs.schedules import CANARY_USER, MAX_REQUEST_ID
from llm_pb import common_pb2, schedule_pb2
from payload_converter import PayloadError
from runtime.auth import Caller
from runtime.background import beside
from runtime.scopes import SCOPES
from services.gateway.effects import Effects
from services.gateway.errors import ScheduleNotFound
from services.gateway.page_token import PageTokens
from services.gateway.schedules.listing import ScheduleListing
from services.gateway.schedules.reader import ScheduleReader
from services.gateway.schedules.service import ScheduleService
from services.gateway.settings import GatewaySettings

_log = logging.getLogger(__name__)
_OPERATOR: Final = Caller("", "gateway", SCOPES)
_PROMPT: Final = "Say something."
_TOKENS: Final = 8
_PART_OF_INTERVAL: Final = 0.9
"""The total time of a canary, relative to the interval. It ends before the next one starts, which would be left out."""
_QUEUE_PART: Final = 0.75
_RETRY: Final = timedelta(seconds=5)
_MAX_RETRY: Final = timedelta(minutes=1)


class Canaries:
    """Brings the schedules of the canaries in line with the settings."""

    def __init__(
        self,
        schedules: ScheduleService,
        reader: ScheduleReader,
        listing: ScheduleListing,
        settings: GatewaySettings,
    ) -> None:
        self._schedules = schedules
        self._reader = reader
        self._listing = listing
        self._settings = settings

    async def keep(self) -> None:
        """Create, update and delete schedules until they are as the settings say. Tries again after a failure."""
        pause = _RETRY
        while True:
            try:
                await self._keep()
            except Exception as error:  # noqa: BLE001  # whatever it was, the gateway serves jobs without canaries
                _log.warning("the canaries are not as GATEWAY_CANARY says yet: %r", error)
            else:
                return
            await asyncio.sleep(pause.total_seconds())
            pause = min(2 * pause, _MAX_RETRY)

    async def _keep(self) -> None:
        wanted = {canary.request_id: canary for canary in self._wanted()}
        request = schedule_pb2.ListSchedulesRequest(user_id=CANARY_USER, page_size=100)
        while True:
            page = await self._listing.list_page(_OPERATOR, request)
            for summary in page.schedules:
                if summary.request_id not in wanted:
                    await self._delete(summary.schedule_id)
            if not page.next_page_token:
                break
            request.page_token = page.next_page_token
        for canary in wanted.values():
            await self._put(canary)

    def _wanted(self) -> list[schedule_pb2.Schedule]:
        canary = self._settings.canary
        if canary is None:
            return []
        # A canary has no tenant, so it may not name the model of one.
        return [
            canary_of(model.name, canary.interval)
            for model in self._settings.models
            if not model.image_sizes
            and (model.tenant is None if canary.models is None else model.name in canary.models)
        ]

    async def _put(self, canary: schedule_pb2.Schedule) -> None:
        id_ = schedule_id(canary.user_id, canary.request_id)
        try:
            found = (await self._reader.get(_OPERATOR, id_)).action
        except ScheduleNotFound:
            await self._schedules.create(_OPERATOR, canary, canary=True)
            return
        except PayloadError:
            # The keys that it was stored with were deleted. It holds nothing that was not made here.
            await self._schedules.delete(_OPERATOR, id_)
            await self._schedules.create(_OPERATOR, canary, canary=True)
            return
        if not found.canary:
            _log.warning("%s is a schedule of somebody else's: its model has no canary", id_)
        elif found.schedule != canary:
            # It stays paused if an operator has paused it.
            await self._schedules.update(_OPERATOR, id_, canary)

    async def _delete(self, id_: str) -> None:
        try:
            if not (await self._reader.get(_OPERATOR, id_)).action.canary:
                return
            await self._schedules.delete(_OPERATOR, id_)
        except ScheduleNotFound:
            # Another gateway has deleted it.
            return
        _log.info("canary deleted", extra={"schedule_id": id_})


@asynccontextmanager
async def keeping_canaries(
    client: Client, settings: GatewaySettings, encryption: Encryption | None, *, knows_tenants: bool
) -> AsyncIterator[None]:
    """Bring the canaries in line with the settings while the context is open. `knows_tenants` is as for listings."""
    reader = ScheduleReader(client)
    listing = ScheduleListing(
        client, PageTokens(settings.page_token_key), settings, encryption, knows_tenants=knows_tenants
    )
    effects = Effects(client, settings.workflow_queue)
    schedules = ScheduleService(client, effects, reader, listing, settings, encryption, None)
    async with beside(Canaries(schedules, reader, listing, settings).keep()):
        yield


def canary_of(model: str, interval: timedelta) -> schedule_pb2.Schedule:
    """Return the canary of a model."""
    canary = schedule_pb2.Schedule(user_id=CANARY_USER, request_id=_name_of(model))
    canary.times.intervals.add(every=duration(timedelta(seconds=round(interval.total_seconds()))))
    job = canary.job
    # Of the class that users have who wait, so that it shows what they see.
    job.model, job.prompt, job.job_class = model, _PROMPT, common_pb2.JOB_CLASS_STANDARD
    job.params.max_tokens, job.params.temperature = _TOKENS, 0
    job.timeouts.total.CopyFrom(duration(interval * _PART_OF_INTERVAL))
    job.timeouts.queue.CopyFrom(duration(interval * _QUEUE_PART))
    canary.catch_up_window.FromSeconds(10)
    return canary


def _name_of(model: str) -> str:
    """Return a request_id that no other model has."""
    name = model.replace("/", ":")
    if name == model and len(name) <= MAX_REQUEST_ID:
        return name
    return f"{name[: MAX_REQUEST_ID - 17]}-{hashlib.sha256(model.encode()).hexdigest()[:16]}"
