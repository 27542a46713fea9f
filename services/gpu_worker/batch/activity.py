"""RunBatchChunk: one attempt at one chunk of a batch, from Temporal's task to the store and back."""

import asyncio
import logging
from datetime import timedelta
from typing import Final

from opentelemetry.metrics import Meter
from temporalio import activity
from temporalio.exceptions import ApplicationError

from batches.chunk import Chunk
from batches.chunk_lines import ChunkLines
from batches.grants import Grant
from batches.segment_writer import SegmentWriter
from feed.feed import Feed
from jobs import batches, names
from jobs.errors import error_type, message_of
from llm_pb import internal_pb2
from services.gpu_worker import spans
from services.gpu_worker.activity import RunLLMOnGPU
from services.gpu_worker.batch.chunk_log import ChunkLog
from services.gpu_worker.batch.item_attempt import Pace
from services.gpu_worker.batch.items import ItemRunner
from services.gpu_worker.batch.metrics import ChunkMetrics
from services.gpu_worker.batch.running import ChunkRun
from services.gpu_worker.engines.engine import Engine
from services.gpu_worker.settings import GpuWorkerSettings
from store.store import ObjectMissing, Store

_log = logging.getLogger(__name__)
_RETRY_DELAY: Final = timedelta(milliseconds=100)
"""Wait before the next attempt at a chunk that was handed over."""


class RunBatchChunk:
    """The activity RunBatchChunk. It shares the engine and its seats with the one that runs jobs."""

    def __init__(
        self,
        jobs: RunLLMOnGPU,
        engine: Engine,
        feed: Feed,
        store: Store | None,
        settings: GpuWorkerSettings,
        worker: str,
        meter: Meter,
    ) -> None:
        """`jobs` runs the attempts at items. `worker` is this worker's name."""
        self._jobs = jobs
        self._engine = engine
        self._feed = feed
        self._store = store
        self._settings = settings
        self._worker = worker
        self._metrics = ChunkMetrics(meter, settings.model)
        self._suspects = asyncio.Lock()
        self._pace = Pace()

    @activity.defn(name=names.ACTIVITY_RUN_BATCH_CHUNK)
    async def __call__(self, request: internal_pb2.ChunkRequest) -> internal_pb2.ChunkResult:
        """Run the items that earlier attempts have not finished.

        Return the chunk as it is then; some items are not done if the batch is to stop. Raises ApplicationError, for
        which Temporal starts the next attempt; it cannot be retried where the batch's objects are gone.
        """
        info = activity.info()
        if self._store is None:
            raise ApplicationError("the worker has no store (STORE_URL), which batches need", type="NO_STORE")
        earlier = batches.later(batches.result_in(info.heartbeat_details), request.earlier)
        number = request.earlier.attempts + info.attempt
        about = {"batch": request.batch_id, "chunk": request.chunk, "attempt": number}
        spans.describe_chunk(request, number, self._worker)
        _log.info("attempt at a chunk started", extra=about)
        feed = self._feed.of_tenant(request.tenant)
        chunk = Chunk(request, earlier, number)
        run = ChunkRun(
            request,
            chunk,
            ItemRunner(request, number, self._jobs, self._engine, self._settings, self._worker, self._pace),
            ChunkLog(feed, batches.log_key(request.batch_id, request.chunk), number, self._worker),
            SegmentWriter(self._store, request, earlier.segments),
            ChunkLines(self._store, request),
            self._jobs,
            Grant(request, earlier.usage, self._settings.default_max_tokens),
            self._settings,
            self._metrics,
            self._suspects,
        )
        try:
            await run.run(first=number == 1)
        except asyncio.CancelledError:
            spans.describe_giving_up()
            raise
        except ObjectMissing as error:
            raise ApplicationError(str(error), chunk.result(), type=batches.INPUT_GONE, non_retryable=True) from error
        finally:
            _log.info("attempt at a chunk ended", extra={**about, "done": batches.done_count(chunk.result())})
        if (stop := run.stop) is None or stop.status is not None or stop.for_grant:
            return chunk.result()
        spans.describe_error(stop.error)
        raise ApplicationError(message_of(stop.error), type=error_type(stop.error), next_retry_delay=_RETRY_DELAY)
