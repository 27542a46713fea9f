"""The page of a schedule, and what people do to the schedule there."""

import json
from collections.abc import Sequence
from http import HTTPStatus
from typing import NamedTuple

from starlette.requests import Request
from starlette.responses import Response

from jobs.ids import is_batch, is_pipeline
from jobs.pipelines import name_of
from llm_pb import pipeline_pb2, schedule_pb2
from services.http.console.formats import duration, state, words_of
from services.http.console.forms import read_form
from services.http.console.item_page import ItemPage, id_of
from services.http.console.job_view import Problem, problem_of
from services.http.rest.messages import to_json

_DEFAULT_CATCH_UP = 3600.0


class Run(NamedTuple):
    """A run, for the template."""

    run: schedule_pb2.ScheduleRun
    words: str
    """How it stands, in words."""
    problem: Problem | None

    @property
    def place(self) -> str:
        """The path under which the page of what it started is."""
        id_ = self.run.workflow_id
        return "/console/" + ("batches" if is_batch(id_) else "pipelines" if is_pipeline(id_) else "jobs")


class SchedulePage(ItemPage):
    """The handlers."""

    place = "/console/schedules"

    async def pause(self, request: Request) -> Response:
        """Pause a schedule."""
        form = await read_form(request, self._front.settings, "note")
        message = schedule_pb2.PauseScheduleRequest(schedule_id=id_of(request), note=form.get("note", "").strip())
        return await self._do(request, "PauseSchedule", message)

    async def resume(self, request: Request) -> Response:
        """Resume a paused schedule."""
        await read_form(request, self._front.settings)
        return await self._do(
            request, "UnpauseSchedule", schedule_pb2.UnpauseScheduleRequest(schedule_id=id_of(request))
        )

    async def trigger(self, request: Request) -> Response:
        """Start a run now."""
        await read_form(request, self._front.settings)
        return await self._do(
            request, "TriggerSchedule", schedule_pb2.TriggerScheduleRequest(schedule_id=id_of(request))
        )

    async def delete(self, request: Request) -> Response:
        """Delete a schedule, and lead to the list."""
        await read_form(request, self._front.settings)
        message = schedule_pb2.DeleteScheduleRequest(schedule_id=id_of(request))
        return await self._do(request, "DeleteSchedule", message, gone=True)

    async def _show(self, request: Request, refused: str = "", status: HTTPStatus = HTTPStatus.OK) -> Response:
        message = schedule_pb2.GetScheduleRequest(schedule_id=id_of(request))
        found = await self._calls(request).call("GetSchedule", message)
        schedule = found.schedule
        return self._pages.render(
            request,
            "schedule.html",
            status,
            refused=refused,
            schedule=schedule,
            starts=_starts(schedule),
            input=_input(schedule.pipeline) if schedule.HasField("pipeline") else "",
            stands=found.status,
            times=_times(schedule.times),
            overlap=words_of(schedule_pb2.OverlapPolicy, schedule.overlap or 1, "OVERLAP_POLICY_"),
            catch_up=duration(schedule.catch_up_window if schedule.HasField("catch_up_window") else _DEFAULT_CATCH_UP),
            runs=[_run(run) for run in reversed(found.status.recent_runs)],
        )


def _starts(schedule: schedule_pb2.Schedule) -> str:
    """Return what runs start: the model of a job, the name of a pipeline, or a batch."""
    return schedule.job.model or name_of(schedule.pipeline) or "a batch"


def _input(pipeline: pipeline_pb2.PipelineRequest) -> str:
    """Return what a pipeline takes, as JSON."""
    kind = pipeline.WhichOneof("spec") or ""
    fields = to_json(pipeline.custom).get("input", {}) if kind == "custom" else to_json(pipeline).get(kind, {})
    return json.dumps(fields, indent=2, ensure_ascii=False)


def _run(run: schedule_pb2.ScheduleRun) -> Run:
    words = state(run.state) if run.state else "Refused" if run.HasField("error") else "Running"
    return Run(run, words, problem_of(run.error) if run.HasField("error") else None)


def _times(times: schedule_pb2.ScheduleTimes) -> Sequence[str]:
    """Return the times in words, one for each expression and interval."""
    zone = times.time_zone or "UTC"
    return [
        *(f"{expression} ({zone})" for expression in times.cron),
        *(
            f"every {duration(interval.every)}"
            + (f", {duration(interval.offset)} later" if interval.HasField("offset") else "")
            for interval in times.intervals
        ),
    ]
