"""The bounds of a schedule that the operator's settings and the present time set."""

import re
import zoneinfo
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from functools import cache
from typing import Final

from jobs import cron
from jobs.field_rules import Violation
from jobs.schedule_rules import MAX_CRONS, MAX_INTERVALS, MAX_SCHEDULE_BYTES, to_datetime
from jobs.schedules import StartRequest, as_submitted
from llm_pb import batch_pb2, pipeline_pb2, schedule_pb2
from services.gateway.batches.submission import BatchSubmission
from services.gateway.job_bounds import JobBounds
from services.gateway.pipelines.submission import PipelineSubmission
from services.gateway.settings import GatewaySettings

_ZONE: Final = re.compile(r"(?!Local$)[A-Za-z][A-Za-z0-9_+/-]{0,63}")
_NO_ZONE: Final = "must be a time zone of the IANA database, such as Europe/Berlin"
UNKNOWN_ZONE: Final = Violation("schedule.times.time_zone", _NO_ZONE)


class ScheduleBounds:
    """Checks schedules against the operator's settings, which bound what they start as well."""

    def __init__(self, work: "WorkBounds", settings: GatewaySettings) -> None:
        self._work = work
        self._settings = settings

    async def check(
        self, request: schedule_pb2.CreateScheduleRequest | schedule_pb2.UpdateScheduleRequest
    ) -> list[Violation]:
        """Return the violations of settings. Raises like WorkBounds.check()."""
        schedule = request.schedule
        if schedule.ByteSize() > MAX_SCHEDULE_BYTES:
            # The rules refuse it.
            return []
        violations = list(self._times(schedule.times, "schedule.times."))
        if schedule.WhichOneof("action"):
            bounds = await self._work.check(as_submitted(schedule))
            violations += [Violation(f"schedule.{field}", rule) for field, rule in bounds]
        return violations

    async def check_backfill(self, request: schedule_pb2.BackfillScheduleRequest) -> list[Violation]:
        """Return the violations of the present time."""
        end = to_datetime(request.end_time)
        if request.HasField("end_time") and end is not None and end > datetime.now(UTC):
            return [Violation("end_time", "must not be in the future")]
        return []

    def _times(self, times: schedule_pb2.ScheduleTimes, path: str) -> Iterator[Violation]:
        least = self._settings.schedule_min_interval
        for index, interval in enumerate(times.intervals[:MAX_INTERVALS]):
            # A shorter one breaks a rule.
            if 1 <= interval.every.seconds < least.total_seconds():
                yield Violation(f"{path}intervals[{index}].every", f"must be at least {least}")
        for index, expression in enumerate(times.cron[:MAX_CRONS]):
            try:
                shortest = timedelta(minutes=cron.parse(expression).shortest_minutes)
            except ValueError:
                # It breaks a rule.
                continue
            if shortest < least:
                yield Violation(f"{path}cron[{index}]", f"must leave at least {least} between two times")
        if times.time_zone and not _is_zone(times.time_zone):
            yield Violation(f"{path}time_zone", _NO_ZONE)
        end = to_datetime(times.end_time)
        if times.HasField("end_time") and end is not None and end <= datetime.now(UTC):
            yield Violation(f"{path}end_time", "must be in the future")


class WorkBounds:
    """Checks what schedules start against the operator's settings."""

    def __init__(self, jobs: JobBounds, batches: BatchSubmission, pipelines: PipelineSubmission) -> None:
        self._jobs = jobs
        self._batches = batches
        self._pipelines = pipelines

    async def check(self, request: StartRequest) -> list[Violation]:
        """Return the violations of settings. Raises ApiError RESOURCE_EXHAUSTED like Models.check."""
        if isinstance(request, batch_pb2.CreateBatchRequest):
            return await self._batches.check(request)
        if isinstance(request, pipeline_pb2.SubmitPipelineRequest):
            return await self._pipelines.check(request)
        return await self._jobs.check(request)


def _is_zone(name: str) -> bool:
    """Return whether there may be such a zone. Without a database of the process's own, Temporal's alone decides."""
    return _ZONE.fullmatch(name) is not None and (not _zones() or name in _zones())


@cache
def _zones() -> frozenset[str]:
    return frozenset(zoneinfo.available_timezones())
