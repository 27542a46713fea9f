"""Commands about schedules: create, ls, get, pause, unpause, trigger, backfill, rm."""

import itertools
from datetime import UTC, datetime, timedelta
from typing import Any

import click

from durable_llm._enums import name_of
from durable_llm.cli._connection import Connection
from durable_llm.cli._jobs_to_submit import content_of, job_for, user_of
from durable_llm.cli._listing import for_each, limit_option
from durable_llm.cli._options import NAME, Duration, connection_options, json_option, sampling_options
from durable_llm.cli._pipelines import spec_of
from durable_llm.cli._progress import state_name
from durable_llm.cli._stdout import write_json, write_line, write_table
from durable_llm.cli._text import age

OVERLAPS = ("skip", "buffer_one", "buffer_all", "cancel_other", "allow_all")
_TIMES = click.DateTime(["%Y-%m-%dT%H:%M:%SZ", "%Y-%m-%dT%H:%MZ", "%Y-%m-%d"])


@click.group()
def schedules() -> None:
    """Create and manage schedules, which start jobs, batches and pipelines by themselves."""


@schedules.command()
@click.argument("request_id", metavar="NAME")
@click.argument("prompt", required=False)
@click.option("-f", "--file", type=click.Path(), help="Read the prompt from a file; `-` is standard input.")
@click.option("--messages", type=click.Path(), help="Read a conversation from a file: a JSON list in OpenAI's form.")
@click.option("--batch", "batch_input", type=NAME, metavar="FILE_ID", help="Start a batch of this file, no job.")
@click.option("--pipeline", type=NAME, help="Start this pipeline, no job. PROMPT is its SPEC, as for `pipeline run`.")
@click.option("-m", "--model", type=NAME, help="Model. [default: the profile's]")
@click.option("--user", type=NAME, help="User whom the jobs are for. [default: the profile's, or your login]")
@click.option("--project", type=NAME, help="Label to group jobs by.")
@click.option("--cron", multiple=True, help='When: "0 6 * * MON-FRI". May be repeated.')
@click.option("--every", multiple=True, type=Duration(), help="When: 30m, 1h. May be repeated.")
@click.option("--time-zone", help="Time zone of --cron: Europe/Berlin. [default: UTC]")
@click.option("--jitter", type=Duration(), help="Start each run later by up to this time.")
@click.option("--overlap", type=click.Choice(OVERLAPS), help="While the job before runs. [default: skip]")
@click.option("--catch-up", type=Duration(), help="How late a missed run may start. [default: 1h]")
@click.option("--pause-on-failure", is_flag=True, help="Pause after a run that fails.")
@click.option("--paused", is_flag=True, help="Create it paused.")
@sampling_options
@json_option
@connection_options
def create(
    connection: Connection,
    *,
    request_id: str,
    prompt: str | None,
    file: str | None,
    messages: str | None,
    batch_input: str | None,
    pipeline: str | None,
    model: str | None,
    user: str | None,
    project: str | None,
    cron: tuple[str, ...],
    every: tuple[timedelta, ...],
    time_zone: str | None,
    jitter: timedelta | None,
    overlap: str | None,
    catch_up: timedelta | None,
    pause_on_failure: bool,
    paused: bool,
    sampling: dict[str, Any],
    as_json: bool,
) -> None:
    """Create the schedule NAME. A repeat finds it."""
    from llm_pb.pipeline_pb2 import PipelineRequest
    from llm_pb.schedule_pb2 import Schedule

    settings = connection.settings
    schedule = Schedule(user_id=user_of(user, settings), request_id=request_id, pause_on_failure=pause_on_failure)
    if batch_input is not None and pipeline is not None:
        raise click.UsageError("Give at most one of --batch and --pipeline.")
    if batch_input is not None:
        if any(given is not None for given in (prompt, file, messages)):
            raise click.UsageError("--batch takes no PROMPT, --file or --messages: its file has those of its lines.")
        schedule.batch.input.file_id = batch_input
        schedule.batch.project_id = project or settings.get("project", "")
    else:
        content = content_of(prompt, file, messages)
        if pipeline is not None:
            spec = spec_of(pipeline, content.get("prompt", ""), "PROMPT for --pipeline")
            schedule.pipeline.MergeFrom(PipelineRequest(**spec))
            schedule.pipeline.project_id = project or settings.get("project", "")
        else:
            job = job_for(connection, user=user, project=project, model=model, params=sampling, **content)
            schedule.job.CopyFrom(job)
            schedule.job.ClearField("user_id")
            schedule.job.ClearField("request_id")
    schedule.times.cron.extend(cron)
    for distance in every:
        schedule.times.intervals.add().every.FromTimedelta(distance)
    schedule.times.time_zone = time_zone or ""
    if jitter is not None:
        schedule.times.jitter.FromTimedelta(jitter)
    if catch_up is not None:
        schedule.catch_up_window.FromTimedelta(catch_up)
    schedule.overlap = _overlap(overlap)
    with connection.connect() as client:
        status = client.schedules.create(schedule, paused=paused)
    write_json(status) if as_json else write_line(status.schedule_id)


@schedules.command()
@click.option("--user", "user_id", type=NAME, help="Only schedules of this user.")
@limit_option
@json_option
@connection_options
def ls(connection: Connection, *, user_id: str | None, limit: int, as_json: bool) -> None:
    """List schedules, the newest first."""
    with connection.connect() as client:
        found = client.schedules.list(user_id=user_id or "", page_size=min(limit, 100) or 100)
        summaries = [*itertools.islice(found, limit or None)]
    if as_json:
        for summary in summaries:
            write_json(summary)
        return
    rows = [
        (
            summary.schedule_id,
            "paused" if summary.paused else "active",
            summary.model,
            summary.user_id,
            summary.next_time.ToJsonString() if summary.HasField("next_time") else "",
            age(summary.last_time.ToDatetime()) if summary.HasField("last_time") else "",
        )
        for summary in summaries
    ]
    write_table(("SCHEDULE ID", "STATE", "MODEL", "USER", "NEXT", "LAST"), rows)


@schedules.command()
@click.argument("schedule_id")
@json_option
@connection_options
def get(connection: Connection, *, schedule_id: str, as_json: bool) -> None:
    """Print a schedule, its next times and its last runs."""
    with connection.connect() as client:
        found = client.schedules.get(schedule_id)
    if as_json:
        write_json(found)
        return
    from llm_pb.schedule_pb2 import OverlapPolicy

    schedule, status = found.schedule, found.status
    when = [*schedule.times.cron, *(f"every {item.every.ToTimedelta()}" for item in schedule.times.intervals)]
    lines = {
        "id": status.schedule_id,
        "state": "paused" if status.paused else "active",
        "note": status.note,
        "when": ", ".join(when),
        "zone": schedule.times.time_zone if schedule.times.cron else "",
        "overlap": name_of(OverlapPolicy, schedule.overlap or 1, "OVERLAP_POLICY_").lower(),
        "model": schedule.job.model,
        "batch": f"of the file {schedule.batch.input.file_id}" if schedule.HasField("batch") else "",
        "pipeline": schedule.pipeline.custom.name or schedule.pipeline.WhichOneof("spec") or "",
        "next": status.next_times[0].ToJsonString() if status.next_times else "never",
        "runs": f"{status.runs}, {status.skipped} skipped, {status.missed} missed",
    }
    for name, text in lines.items():
        if text:
            write_line(f"{name:9}{text}")
    rows = [
        (
            run.nominal_time.ToJsonString(),
            state_name(run.state) if run.state else "REFUSED" if run.HasField("error") else "RUNNING",
            run.workflow_id,
            run.error.message,
        )
        for run in status.recent_runs
    ]
    if rows:
        write_table(("TIME", "STATE", "WORKFLOW ID", "ERROR"), rows)


@schedules.command()
@click.argument("schedule_id")
@click.option("--note", default="", help="Reason for people.")
@connection_options
def pause(connection: Connection, *, schedule_id: str, note: str) -> None:
    """Pause a schedule."""
    with connection.connect() as client:
        client.schedules.pause(schedule_id, note)


@schedules.command()
@click.argument("schedule_id")
@click.option("--note", default="", help="Reason for people.")
@connection_options
def unpause(connection: Connection, *, schedule_id: str, note: str) -> None:
    """Resume a paused schedule."""
    with connection.connect() as client:
        client.schedules.unpause(schedule_id, note)


@schedules.command()
@click.argument("schedule_id")
@click.option("--overlap", type=click.Choice(OVERLAPS), help="While a job runs. [default: the schedule's]")
@connection_options
def trigger(connection: Connection, *, schedule_id: str, overlap: str | None) -> None:
    """Start a run now."""
    with connection.connect() as client:
        client.schedules.trigger(schedule_id, _overlap(overlap))


@schedules.command()
@click.argument("schedule_id")
@click.argument("start", type=_TIMES)
@click.argument("end", type=_TIMES)
@click.option("--overlap", type=click.Choice(OVERLAPS), help="While a job runs. [default: buffer_all]")
@connection_options
def backfill(connection: Connection, *, schedule_id: str, start: datetime, end: datetime, overlap: str | None) -> None:
    """Start a run for each time from START to END, which are in UTC: 2026-11-26T06:00Z."""
    with connection.connect() as client:
        times = client.schedules.backfill(
            schedule_id, start.replace(tzinfo=UTC), end.replace(tzinfo=UTC), _overlap(overlap)
        )
    write_line(f"{schedule_id} {times} times")


@schedules.command()
@click.argument("schedule_ids", metavar="SCHEDULE_ID...", nargs=-1, required=True)
@connection_options
def rm(connection: Connection, *, schedule_ids: tuple[str, ...]) -> None:
    """Delete schedules. Jobs that they have started go on."""
    with connection.connect() as client:

        def delete(schedule_id: str) -> None:
            client.schedules.delete(schedule_id)
            write_line(f"{schedule_id} deleted")

        for_each(schedule_ids, delete)


def _overlap(name: str | None) -> Any:
    from llm_pb.schedule_pb2 import OverlapPolicy

    return OverlapPolicy.Value(f"OVERLAP_POLICY_{name.upper()}") if name else 0
