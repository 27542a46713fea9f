"""Follows one pipeline for all its watchers at this gateway: reads its feed and, when that is silent, asks Temporal."""

import asyncio
import logging
from collections.abc import Mapping
from contextvars import Context
from typing import Final

from temporalio.service import RPCError

from encryption import KeysUnavailable
from feed.feed import Feed
from jobs.pipelines import FINAL_STATES
from llm_pb import internal_pb2, pipeline_pb2
from payload_converter import PayloadError
from services.gateway.errors import ApiError, PipelineNotFound, PipelineResumed, pipeline_resumed
from services.gateway.pipelines.live import Live, LiveSteps, is_live
from services.gateway.pipelines.reader import Look, PipelineReader
from services.gateway.scopes import gateway_for

_log = logging.getLogger(__name__)
_SILENT: Final = 5
"""Time, in poll intervals, after which Temporal is asked about a pipeline whose feed is there and silent."""
_LIVE: Final = 1.0
"""Seconds between two looks at what running steps report."""
_FIRST_LOOK: Final = 0.02
"""Seconds until Temporal is asked again about a pipeline that is about to end. They double up to the poll interval."""

_LOOKS_AT_END: Final = 10
"""Number of times that Temporal is asked for the tree of a pipeline that has ended. The code of then may never answer,
and a gateway that has just begun answers late."""


class PipelineFollower:
    """What a gateway knows of one pipeline. Starts following it immediately; must be closed."""

    def __init__(
        self, pipeline_id: str, run_id: str, reader: PipelineReader, live: LiveSteps, feed: Feed, poll: float
    ) -> None:
        """`run_id` is that of the pipeline's workflow; `poll` is in seconds."""
        self.watchers = 0
        """Number of clients that watch. The owner counts them."""
        self.status = pipeline_pb2.PipelineStatus()
        self.version = -1
        """The version of the tree. -1: nothing is known yet. A crash may take versions back."""
        self.nodes: Mapping[int, internal_pb2.PipelineNode] = {}
        """The nodes by their numbers, in their order. It is replaced, never changed; what is equal stays the same."""
        self.live: Live = {}
        """What steps report that run. It is replaced, never changed."""
        self.result: pipeline_pb2.PipelineResult | None = None
        self.changes = 0
        """Number of changes of the status, of a node or of what steps report."""
        self.changed = asyncio.Event()
        """Set at the next change. Each change has an event of its own."""
        self._id = pipeline_id
        self.run_id = run_id
        self._reader = reader
        self._feed = feed
        self._poll = poll
        self._stale = asyncio.Event()
        self._ending = False
        self._looks_at_end = _LOOKS_AT_END
        self.looks = 0
        """Number of times that Temporal was asked."""
        self.answered = 0
        """The last of them that the workflow itself has answered."""
        self._fed = -1
        """The version that the feed has brought last."""
        self._is_torn = False
        """Whether the tree may hold what a crash has taken back."""
        self._tasks = [
            # They work for all watchers, so they must not continue the trace of the first one.
            asyncio.create_task(self._follow(), context=Context()),
            asyncio.create_task(feed.read(run_id, self._take_record), context=Context()),
            asyncio.create_task(self._follow_live(live), context=Context()),
        ]
        self._tasks[0].add_done_callback(lambda _: self._wake())

    @property
    def ended(self) -> bool:
        """Whether the outcome is durable, so that nothing changes any more."""
        return self.status.state in FINAL_STATES

    @property
    def over(self) -> bool:
        """Whether there is nothing more to follow."""
        return self._tasks[0].done()

    def raise_failure(self) -> None:
        """Raise the error that ended the following, if one did."""
        if self.over:
            self._tasks[0].result()

    def ask(self) -> None:
        """Ask Temporal soon."""
        self._stale.set()

    async def close(self) -> None:
        """Stop following the pipeline."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _follow(self) -> None:
        """Ask Temporal whenever it is worth it, to the end.

        Raises ApiError for a pipeline that is gone, PayloadError for one that can never be read.
        """
        look = _FIRST_LOOK
        while True:
            self._stale.clear()
            self.looks, version = self.looks + 1, self.version
            try:
                description = await self._reader.describe(gateway_for(self._id), self._id)
                if description.run_id != self.run_id:
                    raise pipeline_resumed()
                found = await self._reader.look(description)
                if found.answered or found.record.status.state not in FINAL_STATES or not self._looks_at_end:
                    self._take_look(found, version)
                else:
                    self._looks_at_end -= 1
                    self._ending = True
            except (PipelineNotFound, PipelineResumed, PayloadError):
                raise
            except (ApiError, RPCError, KeysUnavailable) as error:
                _log.warning("cannot ask Temporal about %s: %r", self._id, error)
            if self.ended:
                return
            if self._ending:
                look = min(look, self._poll)
                await asyncio.sleep(look)
                look *= 2
                continue
            wait = self._poll * (_SILENT if self._feed.available else 1)
            try:
                async with asyncio.timeout(wait):
                    await self._stale.wait()
            except TimeoutError:
                pass

    async def _follow_live(self, live: LiveSteps) -> None:
        """Read what running steps report, once a second while there is one that does."""
        while True:
            changed = self.changed
            if any(is_live(node) for node in self.nodes.values()):
                await self._read_live(live)
                await asyncio.sleep(_LIVE)
            else:
                self.live = {} if self.live else self.live
                await changed.wait()

    async def _read_live(self, live: LiveSteps) -> None:
        try:
            description = await self._reader.describe(gateway_for(self._id), self._id)
        except (ApiError, RPCError) as error:
            _log.info("cannot read the steps of %s: %r", self._id, error)
            return
        found = await live.read(description, self.nodes.values())
        if found != self.live:
            self.live = found
            self.changes += 1
            self._wake()

    def _take_record(self, record: internal_pb2.FeedRecord) -> bool:
        """Take a record of the feed. Return True once there are no more."""
        if record.HasField("job_ending"):
            self._ending = True
            self._stale.set()
            return True
        if record.HasField("pipeline_change"):
            self._take_change(record.pipeline_change)
        return False

    def _take_change(self, change: internal_pb2.PipelineChange) -> None:
        """Take a change, or ask Temporal where it does not continue what is known."""
        # A change that begins before the end of the last one is of a worker that has not done what came between.
        self._is_torn = self._is_torn or change.since < self._fed
        self._fed = change.record.version
        if not self._is_torn and self._fed <= self.version:
            return
        if self._is_torn or change.since > self.version or not change.record.HasField("status"):
            self._stale.set()
            return
        self.version = change.record.version
        # A record that was told in parts has the version of the first part. Nodes of later parts may be newer.
        newer = [node for node in change.record.nodes if self._is_newer(node)]
        self._take(internal_pb2.PipelineRecord(status=change.record.status, nodes=newer), {**self.nodes})

    def _is_newer(self, node: internal_pb2.PipelineNode) -> bool:
        known = self.nodes.get(node.number)
        return known is None or node.version >= known.version

    def _take_look(self, look: Look, version: int) -> None:
        """Take what Temporal tells. `version` is the one that was known when it was asked."""
        record, final = look.record, look.record.status.state in FINAL_STATES
        if look.answered:
            self.answered = self.looks
            # A pipeline that is behind what was known when it was asked has been taken back.
            if final or self._is_torn or record.version < version or record.version >= self.version:
                self.version, self._is_torn = record.version, False
                self._take(record, {})
        elif final or record.version >= self.version:
            self.version = max(record.version, self.version)
            self._take(record, {**self.nodes})
        self._wake()

    def _take(self, record: internal_pb2.PipelineRecord, nodes: dict[int, internal_pb2.PipelineNode]) -> None:
        """Take a record. `nodes` are those that stay as they are."""
        for node in record.nodes:
            known = self.nodes.get(node.number)
            nodes[node.number] = known if known is not None and known == node else node
        if self.status.HasField("root") and not record.status.HasField("root"):
            # An operator has ended it, and its workflow does not answer: what was known is all there is.
            record.status.root.CopyFrom(self.status.root)
        if nodes != self.nodes or record.status != self.status:
            self.nodes, self.status = nodes, record.status
            self.changes += 1
        if record.HasField("result"):
            self.result = record.result
        self._wake()

    def _wake(self) -> None:
        self.changed.set()
        self.changed = asyncio.Event()
