"""The worker's two polls: of its model's queue, and of the queue of the model's background jobs.

Each is a Worker of Temporal's SDK with slots of its own, because a paused job keeps its slot while another one has its
seat. Together they have more slots than there are seats. But neither polls while the jobs at the worker need all seats,
so that jobs wait in the queue, where other workers find them.
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Final

from temporalio.client import Client
from temporalio.worker import (
    CustomSlotSupplier,
    FixedSizeSlotSupplier,
    PollerBehaviorSimpleMaximum,
    SlotMarkUsedContext,
    SlotPermit,
    SlotReleaseContext,
    SlotReserveContext,
    Worker,
    WorkerTuner,
)

from services.gpu_worker.activity import RunLLMOnGPU
from services.gpu_worker.batch.activity import RunBatchChunk
from services.gpu_worker.seats import Seats
from services.gpu_worker.settings import GpuWorkerSettings, queues_of

_POLLS: Final = {False: 5, True: 1}
"""Maximum number of concurrent polls, for background jobs and for others. A job that comes when its seat was taken
meanwhile has to wait for one at the worker, and there is at most one such job for each poll."""


@asynccontextmanager
async def polling(
    client: Client, activity: RunLLMOnGPU, chunks: RunBatchChunk, settings: GpuWorkerSettings, name: str
) -> AsyncIterator[None]:
    """Poll both queues while the context is open. As it closes, running jobs finish or are handed over."""
    queue, background_queue = queues_of(settings)

    def worker(queue: str, *, background: bool) -> Worker:
        few = FixedSizeSlotSupplier(1)
        return Worker(
            client,
            task_queue=queue,
            activities=[activity.__call__, chunks.__call__],
            identity=name,
            tuner=WorkerTuner.create_composite(
                workflow_supplier=few,
                activity_supplier=_Slots(activity.seats, background=background),
                local_activity_supplier=few,
                nexus_supplier=few,
            ),
            activity_task_poller_behavior=PollerBehaviorSimpleMaximum(_POLLS[background]),
            # A cancel reaches a running activity with the answer to a heartbeat, by default 22 s late.
            max_heartbeat_throttle_interval=settings.heartbeat_interval,
            graceful_shutdown_timeout=settings.shutdown_grace,
        )

    one, other = worker(queue, background=False), worker(background_queue, background=True)
    async with one, other:
        try:
            yield
        finally:
            # Both have the time of the grace, at once.
            await asyncio.gather(one.shutdown(), other.shutdown())


class _Slots(CustomSlotSupplier):
    """The slots of one poll: as many as there are seats for its jobs now."""

    def __init__(self, seats: Seats, *, background: bool) -> None:
        self._seats = seats
        self._background = background
        self._reserved = 0
        self._loop = asyncio.get_running_loop()

    async def reserve_slot(self, ctx: SlotReserveContext) -> SlotPermit:
        """Wait until the worker has a seat for one more job."""
        await self._seats.until(lambda: self._reserved < self._seats.slots(background=self._background))
        self._reserved += 1
        return SlotPermit()

    def try_reserve_slot(self, ctx: SlotReserveContext) -> SlotPermit | None:
        """Reserve nothing: it is for activities of workflows that run in the same process."""
        return None

    def mark_slot_used(self, ctx: SlotMarkUsedContext) -> None:
        """Do nothing: a slot counts from its reservation on."""

    def release_slot(self, ctx: SlotReleaseContext) -> None:
        """Release a slot. Called from a thread of the SDK."""
        # The loop may be closed as the process ends.
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self._release)

    def _release(self) -> None:
        self._reserved -= 1
        self._seats.note_change()
