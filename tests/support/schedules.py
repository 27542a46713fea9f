"""How tests create schedules and wait for their runs."""

import asyncio
import itertools
from collections.abc import Callable
from typing import Any

from llm_pb import llm_pb2, schedule_pb2
from llm_pb.schedule_pb2_grpc import ScheduleServiceStub

_ids = itertools.count(1)
PATIENCE = 120


def new_schedule(
    prompt: str = "Say something.", params: dict[str, Any] | None = None, model: str = "docstrings", **changes: Any
) -> schedule_pb2.Schedule:
    """Return a schedule with a new request id, which starts nothing by itself for a year unless `times` says so."""
    number = next(_ids)
    job = llm_pb2.JobRequest(model=model, prompt=prompt, params=params or {"max_tokens": 2})  # type: ignore[arg-type]
    values = {"user_id": f"user-{number}", "request_id": f"sched-{number}", "job": job, **changes}
    values.setdefault("times", {"cron": ["0 0 1 1 *"]})
    return schedule_pb2.Schedule(**values)


def every(seconds: int, **more: Any) -> dict[str, Any]:
    """Return times at equal distances."""
    return {"intervals": [{"every": {"seconds": seconds}}], **more}


async def create(stub: ScheduleServiceStub, schedule: schedule_pb2.Schedule, **more: Any) -> str:
    """Create a schedule and return its id."""
    request = schedule_pb2.CreateScheduleRequest(schedule=schedule, **more)
    return (await stub.CreateSchedule(request)).status.schedule_id


async def get(stub: ScheduleServiceStub, id_: str) -> schedule_pb2.GetScheduleResponse:
    return await stub.GetSchedule(schedule_pb2.GetScheduleRequest(schedule_id=id_))


async def trigger(stub: ScheduleServiceStub, id_: str) -> None:
    """Start a run now, and return when a further call would start another one: in the next second."""
    await stub.TriggerSchedule(schedule_pb2.TriggerScheduleRequest(schedule_id=id_))
    await asyncio.sleep(1)


async def delete(stub: ScheduleServiceStub, id_: str) -> None:
    await stub.DeleteSchedule(schedule_pb2.DeleteScheduleRequest(schedule_id=id_))


async def until(
    stub: ScheduleServiceStub, id_: str, condition: Callable[[schedule_pb2.ScheduleStatus], Any]
) -> schedule_pb2.ScheduleStatus:
    """Return the schedule's status once it meets the condition."""
    async with asyncio.timeout(PATIENCE):
        while not condition(status := (await get(stub, id_)).status):  # noqa: ASYNC110  nothing notifies
            await asyncio.sleep(0.1)
    return status


def ended(status: schedule_pb2.ScheduleStatus) -> list[schedule_pb2.ScheduleRun]:
    """Return the runs that have ended."""
    return [run for run in status.recent_runs if run.state or run.HasField("error")]
