"""The stream of JetStream that holds the feed."""

import logging

from nats.errors import Error as NatsError
from nats.js import JetStreamContext
from nats.js.api import StorageType, StreamConfig
from nats.js.errors import NotFoundError

from feed.feed import FeedSettings
from feed.nats_consumers import reraise_cancel

_log = logging.getLogger(__name__)


async def create_stream(stream: JetStreamContext, settings: FeedSettings) -> None:
    """Create the stream; give one that exists the limits of the settings.

    A role without the permission to change the stream works with the one that exists.
    """
    config = StreamConfig(
        name=settings.stream,
        subjects=[f"{settings.subject_prefix}.*"],
        storage=StorageType.FILE,
        max_age=settings.max_age.total_seconds(),
        max_bytes=settings.max_bytes,
        # Left to itself, nats-server 2.15 takes 1,000.
        max_consumers=settings.max_readers,
        num_replicas=settings.replicas,
    )
    try:
        found = (await reraise_cancel(stream.stream_info(settings.stream))).config
    except NotFoundError:
        await reraise_cancel(stream.add_stream(config))
        return
    if (found.max_consumers or 0) <= 0:
        # An earlier nats-server made the stream without a limit, and some of them cannot set one later.
        config.max_consumers = found.max_consumers
    if _own(found) == _own(config):
        return
    try:
        await reraise_cancel(stream.update_stream(config))
    except (NatsError, OSError, TimeoutError) as error:
        # The role may lack the permission.
        _log.warning("the feed's stream keeps limits that differ from FEED_…: %r", error)


def _own(config: StreamConfig) -> tuple[object, ...]:
    """Return the part of a stream's configuration that the settings determine."""
    limits = config.max_age, config.max_bytes, config.max_consumers
    return config.subjects, config.storage, *limits, config.num_replicas
