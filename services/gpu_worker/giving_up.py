"""Why Temporal has given an attempt up."""

from datetime import UTC, datetime

from temporalio import activity

from jobs.errors import JobError, RunTimeout, WorkerLost


def why_given_up(info: activity.Info) -> JobError:
    """Return why Temporal has given up an attempt that still runs. It does not say which of its timeouts has passed."""
    limits = [
        since + limit
        for since, limit in (
            (info.started_time, info.start_to_close_timeout),
            (info.scheduled_time, info.schedule_to_close_timeout),
        )
        if limit is not None
    ]
    if datetime.now(UTC) >= min(limits, default=datetime.max.replace(tzinfo=UTC)):
        return RunTimeout("Temporal gave the attempt up: it exceeded a time limit")
    return WorkerLost("Temporal gave the attempt up: its heartbeats did not arrive")
