"""StreamStatus: the watchers of this gateway. Watchers of the same job share one Watch."""

from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing, asynccontextmanager
from functools import partial

from feed.feed import Feed
from jobs.ids import owner
from jobs.resume_token import ResumeToken
from llm_pb import llm_pb2
from payload_converter import PayloadError
from runtime.answers import Answer
from runtime.auth import Caller
from runtime.keyed_limiter import KeyedLimiter
from services.gateway.access import read_own, require_own
from services.gateway.errors import exhausted, not_found, shutting_down
from services.gateway.job_reader import JobReader
from services.gateway.metrics import GatewayMetrics
from services.gateway.settings import GatewaySettings
from services.gateway.streams.watch import Watch
from services.gateway.streams.watchers import Watchers
from store.store import Store


class Streams:
    """The StreamStatus calls that this gateway serves."""

    def __init__(
        self,
        reader: JobReader,
        feed: Feed,
        settings: GatewaySettings,
        metrics: GatewayMetrics,
        store: Store | None = None,
    ) -> None:
        """`store` holds outputs that are files."""
        self._store = store
        self._metrics = metrics
        self._reader = reader
        self._feed = feed
        self._settings = settings
        self._watches: dict[str, Watch] = {}
        most_of_user = settings.max_watchers_per_user
        self._watchers = Watchers(settings, "jobs")
        self._of_user = KeyedLimiter(
            most_of_user,
            lambda: exhausted(f"{most_of_user} streams watch this user's jobs, the limit; end one first"),
        )

    async def stream(
        self, caller: Caller, request: llm_pb2.StreamStatusRequest, answer: Answer
    ) -> AsyncGenerator[llm_pb2.StreamStatusResponse, None]:
        """Yield the messages of StreamStatus: see llm.proto. Their size is limited by the room of `answer`.

        Raises ApiError NOT_FOUND, RESOURCE_EXHAUSTED above a limit of watchers, UNAVAILABLE when the gateway stops;
        RPCError when Temporal is unavailable at the start.
        """
        require_own(caller, request.workflow_id)
        async with (
            self._watchers.acquired(caller),
            self.joined(caller, request.workflow_id) as watch,
            self._of_user.acquired(owner(watch.user_id, caller.tenant)),
        ):
            token = ResumeToken.parse(request.resume_token)
            async with aclosing(watch.messages(request.output_offset, answer.room, token)) as messages:
                async for message in messages:
                    answer.sending(message.ByteSize())
                    # The yield returns once gRPC has sent the message.
                    yield message
                    answer.left()

    def expect_end(self, workflow_id: str) -> None:
        """Expect a job to end soon, so that its watchers here get the end immediately."""
        if (watch := self._watches.get(workflow_id)) is not None:
            watch.expect_end()

    def close(self) -> None:
        """End every stream with UNAVAILABLE. Its client continues with another gateway, or with this one later."""
        for watch in self._watches.values():
            watch.stop(shutting_down())

    @asynccontextmanager
    async def joined(self, caller: Caller, workflow_id: str) -> AsyncIterator[Watch]:
        """Watch a job while the context is open, beyond the limits of streams. Raises like stream()."""
        watch = self._watches.get(workflow_id)
        if watch is None or watch.over:
            watch = Watch(
                workflow_id, self._reader, self._feed, self._settings, self._metrics.feed_lag, watch, self._store
            )
            self._watches[workflow_id] = watch
            self._metrics.watches.add(1)
        watch.watchers += 1
        self._metrics.watchers.add(1)
        try:
            # The watch itself is that of all callers.
            await read_own(
                caller,
                watch.known(),
                lambda _: watch.user_id,
                partial(_user_of_unread, watch),
                partial(not_found, workflow_id),
            )
            yield watch
        finally:
            watch.watchers -= 1
            self._metrics.watchers.add(-1)
            if watch.watchers == 0:
                self._metrics.watches.add(-1)
                if self._watches.get(workflow_id) is watch:
                    del self._watches[workflow_id]
                await watch.close()


async def _user_of_unread(watch: Watch, error: Exception) -> str | None:
    """Return whose a job is that cannot be decrypted: see read_own()."""
    # Without the keys it may not be known yet. Once they are deleted nothing tells any more.
    return watch.user_id if watch.user_id or isinstance(error, PayloadError) else None
