"""Commands about jobs that exist: ls, get, cancel, delete, delete-user, deliveries, redeliver."""

import sys
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import click

from durable_llm._enums import name_of
from durable_llm.cli._connection import Connection
from durable_llm.cli._exits import Interrupted
from durable_llm.cli._interrupts import interruptible
from durable_llm.cli._listing import cancel_each, for_each, ids_option, limit_option, page_size_of, print_list
from durable_llm.cli._options import NAME, ClassName, connection_options, json_option
from durable_llm.cli._progress import class_name, state_name
from durable_llm.cli._stdout import write_json, write_line, write_table
from durable_llm.cli._text import age

if TYPE_CHECKING:
    from llm_pb.llm_pb2 import Deletion, Delivery, JobSummary

_GOES_ON = "What was asked for is deleted nevertheless."
STATES = ("queued", "running", "notifying", "succeeded", "failed", "cancelled", "timed_out")


@click.command()
@click.option("--user", "user_id", type=NAME, help="Only jobs of this user.")
@click.option(
    "--state",
    multiple=True,
    type=click.Choice(STATES, case_sensitive=False),
    help="Only jobs in this state. May be repeated.",
)
@click.option("--class", "classes", multiple=True, type=ClassName(), help="Only jobs of this class. May be repeated.")
@click.option("-m", "--model", type=NAME, help="Only jobs for this model.")
@click.option("--project", "project_id", type=NAME, help="Only jobs with this label.")
@limit_option
@ids_option
@json_option
@connection_options
def ls(
    connection: Connection,
    *,
    state: tuple[str, ...],
    classes: tuple[str, ...],
    limit: int,
    quiet: bool,
    as_json: bool,
    **filters: Any,
) -> None:
    """List jobs: open jobs first, then those that ended last."""
    states = [f"JOB_STATE_{name.upper()}" for name in state]
    filters = {name: value or "" for name, value in filters.items()}
    with connection.connect() as client:
        found = client.list(states=states, classes=classes, page_size=page_size_of(limit), **filters)
        header = ("WORKFLOW ID", "STATE", "MODEL", "USER", "AGE")
        print_list(found, header, _row, limit=limit, quiet=quiet, as_json=as_json)


@click.command()
@click.argument("workflow_id")
@json_option
@connection_options
def get(connection: Connection, *, workflow_id: str, as_json: bool) -> None:
    """Print how a job stands, whatever its state. `output` prints its text."""
    with connection.connect() as client:
        found = client.job(workflow_id).get()
    if as_json:
        write_json(found)
        return
    from durable_llm._prices import amount

    status, metadata = found.status, found.result.metadata
    lines = {
        "id": status.workflow_id,
        "state": state_name(status.state) + (", cancel requested" if status.cancel_requested else ""),
        "attempt": str(status.attempt or ""),
        "error": status.error.message,
        "worker": status.progress.worker,
        "progress": f"{status.progress.percent:.0f} %" if status.HasField("progress") else "",
        "class": class_name(status.job_class) if status.job_class else "",
        "created": _time(status, "create_time"),
        "started": _time(status, "start_time"),
        "ended": _time(status, "end_time"),
        "model": metadata.model,
        "tokens": str(metadata.output_tokens or ""),
        "cost": amount(metadata.cost_micros) if metadata.HasField("cost_micros") else "",
        "trace": status.trace_id,
    }
    for name, text in lines.items():
        if text:
            write_line(f"{name:9}{text}")


@click.command()
@click.argument("workflow_ids", metavar="WORKFLOW_ID...", nargs=-1, required=True)
@click.option("--reason", default="", help="Reason for people. The job's error shows it.")
@json_option
@connection_options
def cancel(connection: Connection, *, workflow_ids: tuple[str, ...], reason: str, as_json: bool) -> None:
    """Request that jobs stop. What they have generated is kept."""
    with connection.connect() as client:
        cancel_each(
            workflow_ids,
            lambda workflow_id: client.job(workflow_id).cancel(reason),
            lambda status: state_name(status.state) if status.HasField("end_time") else "",
            as_json=as_json,
        )


@click.command()
@click.argument("workflow_ids", metavar="WORKFLOW_ID...", nargs=-1, required=True)
@click.option("-y", "--yes", is_flag=True, help="Do not ask.")
@json_option
@connection_options
def delete(connection: Connection, *, workflow_ids: tuple[str, ...], yes: bool, as_json: bool) -> None:
    """Delete jobs with prompts and outputs, and wait until they are gone. Open jobs are cancelled first."""
    _ask(f"Delete {', '.join(workflow_ids)} for good?", yes=yes)
    try:
        with connection.connect() as client, interruptible():
            for_each(
                workflow_ids,
                lambda id_: _print_deletion(f"{id_} deleted", client.job(id_).delete(), as_json=as_json),
            )
    except KeyboardInterrupt:
        raise Interrupted(_GOES_ON) from None


@click.command()
@click.argument("user_id", type=NAME)
@click.option("-y", "--yes", is_flag=True, help="Do not ask.")
@json_option
@connection_options
def delete_user(connection: Connection, *, user_id: str, yes: bool, as_json: bool) -> None:
    """Delete all that a user has, and wait until it is gone: jobs, pipelines, batches, files and schedules."""
    _ask(f"Delete all that {user_id} has for good?", yes=yes)
    try:
        with connection.connect() as client, interruptible():
            deletion = client.delete_user(user_id)
    except KeyboardInterrupt:
        raise Interrupted(_GOES_ON) from None
    counts = (
        f"{deletion.deleted_jobs} jobs and pipelines, {deletion.deleted_batches} batches, "
        f"{deletion.deleted_files} files and {deletion.deleted_schedules} schedules"
    )
    _print_deletion(f"{counts} of {user_id} deleted", deletion, as_json=as_json)


def _ask(question: str, *, yes: bool) -> None:
    if not yes:
        if not sys.stdin.isatty():
            raise click.UsageError("Nobody can be asked here: --yes deletes without a question.")
        click.confirm(question, abort=True, err=True)


def _print_deletion(what: str, deletion: "Deletion", *, as_json: bool) -> None:
    if as_json:
        write_json(deletion)
        return
    copies = ", ".join(sorted({copy.place for copy in deletion.unreached}))
    write_line(what + (f"; copies may be in: {copies}" if copies else ""))


@click.command()
@click.argument("workflow_id")
@json_option
@connection_options
def deliveries(connection: Connection, *, workflow_id: str, as_json: bool) -> None:
    """List the deliveries of a job's events."""
    with connection.connect() as client:
        _print_deliveries(client.job(workflow_id).deliveries(), as_json=as_json)


@click.command()
@click.argument("workflow_id")
@click.option(
    "--delivery", "ids", multiple=True, help="Id of a delivery to send again. May be repeated. [default: all]"
)
@json_option
@connection_options
def redeliver(connection: Connection, *, workflow_id: str, ids: tuple[str, ...], as_json: bool) -> None:
    """Send the outcome of an ended job again. Prints the deliveries as they were before."""
    with connection.connect() as client:
        _print_deliveries(client.job(workflow_id).redeliver(*ids), as_json=as_json)


def _row(job: "JobSummary") -> tuple[str, ...]:
    status = job.status
    return (
        status.workflow_id,
        state_name(status.state),
        job.model,
        job.user_id,
        age(status.create_time.ToDatetime()),
    )


def _print_deliveries(found: Iterable["Delivery"], *, as_json: bool) -> None:
    from llm_pb.llm_pb2 import NotifyState

    rows = []
    for delivery in found:
        if as_json:
            write_json(delivery)
        state = name_of(NotifyState, delivery.state, "NOTIFY_STATE_")
        error = delivery.attempts[-1].error.message if delivery.attempts else ""
        rows.append((delivery.id, delivery.type, delivery.target, state, str(len(delivery.attempts)), error))
    if not as_json:
        write_table(("ID", "TYPE", "TARGET", "STATE", "ATTEMPTS", "ERROR"), rows)


def _time(status: Any, field: str) -> str:
    return getattr(status, field).ToJsonString() if status.HasField(field) else ""
