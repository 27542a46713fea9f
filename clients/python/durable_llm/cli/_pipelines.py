"""Commands about pipelines: pipeline run, watch, tree, ls, answer, cancel."""

import contextlib
import json
import uuid
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import click

from durable_llm.cli._connection import Connection
from durable_llm.cli._exits import CommandError
from durable_llm.cli._follow_pipeline import as_fields, described, error_of, follow_pipeline, state_of
from durable_llm.cli._jobs_to_submit import user_of
from durable_llm.cli._listing import NO_ANSWER, cancel_each, ids_option, limit_option, page_size_of, print_list
from durable_llm.cli._options import NAME, ClassName, Duration, Limit, WholeNumber, connection_options, json_option
from durable_llm.cli._progress import Progress
from durable_llm.cli._stdout import write_json, write_line
from durable_llm.cli._submitting import submitting
from durable_llm.cli._text import age, say, visible

if TYPE_CHECKING:
    from collections.abc import Sequence

    from llm_pb.pipeline_pb2 import PipelineStatus, StepStatus

_follow_option = click.option(
    "--follow",
    multiple=True,
    type=NAME,
    help='Print the output of steps as it comes: "rounds/*/write". May be repeated.',
)
_images_option = click.option(
    "--images",
    type=click.Path(file_okay=False),
    help="Download the images that its steps have made into this folder, however it ends.",
)
_quiet_option = click.option("-q", "--quiet", is_flag=True, help="Show no progress.")


@click.group()
def pipeline() -> None:
    """Run programs made of jobs, follow their trees, answer their questions."""


@pipeline.command()
@click.argument("name", type=NAME)
@click.argument("spec", required=False, type=NAME)
@click.option("-f", "--file", type=click.File("rb"), help="Read SPEC from a file; `-` is standard input.")
@click.option("--user", type=NAME, help="User whom the pipeline is for. [default: your login name]")
@click.option("--project", "project_id", type=NAME, help="A label to list pipelines by.")
@click.option("--class", "job_class", type=ClassName(), help="How urgent its jobs are.")
@click.option("--timeout", type=Duration(), help="Time after which it is stopped. [default: 24h]")
@click.option("--output-tokens", type=Limit(WholeNumber(64)), help="Budget of output tokens of all steps together.")
@click.option("--request-id", type=NAME, help="Key of the pipeline. [default: a random one]")
@click.option("-d", "--detach", is_flag=True, help="Print the id and do not wait.")
@_follow_option
@_images_option
@_quiet_option
@connection_options
def run(
    connection: Connection,
    *,
    name: str,
    spec: str | None,
    file: Any,
    user: str | None,
    project_id: str | None,
    job_class: str | None,
    timeout: timedelta | None,
    output_tokens: int | None,
    request_id: str | None,
    detach: bool,
    follow: tuple[str, ...],
    images: str | None,
    quiet: bool,
) -> None:
    """Run the pipeline NAME, and print what it has made, as JSON. SPEC is its input, as JSON.

    For refine: '{"topic": "rain", "models": {"write": "docstrings"}}'. For world: '{"theme": "rain", "models":
    {"describe": "docstrings"}}'. For a pipeline of the operator, a message of a
    type of protobuf's own: '{"@type": "type.googleapis.com/google.protobuf.StringValue", "value": "rain"}'.
    """
    if (spec is None) == (file is None):
        raise CommandError("give either SPEC or --file")
    fields: dict[str, Any] = {
        **spec_of(name, spec if file is None else file.read()),
        "user_id": user_of(user, connection.settings),
        "project_id": project_id or "",
        "request_id": request_id or uuid.uuid4().hex,
        "job_class": job_class,
        "total_timeout": timeout,
        "budget": {"output_tokens": output_tokens} if output_tokens is not None else None,
    }
    progress = Progress(quiet=quiet)
    with connection.connect() as client:
        with submitting("Run", fields["request_id"]), progress:
            started = client.pipelines.submit(**{key: value for key, value in fields.items() if value is not None})
        if detach:
            write_line(started.pipeline_id)
            return
        say(started.pipeline_id)
        follow_pipeline(client, started.pipeline_id, follow, images=images, quiet=quiet)


@pipeline.command()
@click.argument("pipeline_id")
@click.option("--cursor", default="", help="Only what came after this cursor.")
@_follow_option
@_images_option
@_quiet_option
@json_option
@connection_options
def watch(
    connection: Connection,
    *,
    pipeline_id: str,
    cursor: str,
    follow: tuple[str, ...],
    images: str | None,
    quiet: bool,
    as_json: bool,
) -> None:
    """Follow a pipeline to its end, and print what it has made, as JSON."""
    with connection.connect() as client:
        follow_pipeline(client, pipeline_id, follow, cursor=cursor, images=images, quiet=quiet, as_json=as_json)


@pipeline.command()
@click.argument("pipeline_id")
@click.option("--path", default="", help="Only this step and those below it.")
@json_option
@connection_options
def tree(connection: Connection, *, pipeline_id: str, path: str, as_json: bool) -> None:
    """Print the steps of a pipeline as a tree."""
    with connection.connect() as client:
        found = client.pipelines.get(pipeline_id, path)
    if as_json:
        write_json(as_fields(found))
        return
    status = found.status
    write_line(f"{status.pipeline_id} {state_of(status)}{error_of(status.root)}")
    for step in in_tree_order(found.steps):
        depth = step.path.count("/") + 1
        write_line("  " * depth + described(step, step.path.rpartition("/")[2], kind=True))
    if not found.steps and (total := status.root.counts.total):
        say(f"No steps can be shown, of {total}: no gateway that was asked has the code that made them.")


@pipeline.command()
@click.option("--user", "user_id", type=NAME, help="Only pipelines of this user.")
@click.option("--project", "project_id", type=NAME, help="Only pipelines with this label.")
@limit_option
@ids_option
@json_option
@connection_options
def ls(connection: Connection, *, limit: int, quiet: bool, as_json: bool, **filters: Any) -> None:
    """List pipelines: open ones first, then those that ended last."""
    filters = {name: value or "" for name, value in filters.items()}
    with (
        connection.connect() as client,
        contextlib.closing(client.pipelines.list(page_size=page_size_of(limit), **filters)) as found,
    ):
        header = ("PIPELINE ID", "NAME", "STATE", "STEPS", "USER", "AGE")
        print_list(found, header, _row, limit=limit, quiet=quiet, as_json=as_json)


@pipeline.command()
@click.argument("pipeline_id")
@click.argument("path")
@click.option("--yes/--no", "approved", required=True, help="Whether it may do what it asks for.")
@click.option("--answer-id", type=NAME, help="Key of the answer. [default: a random one]")
@json_option
@connection_options
def answer(
    connection: Connection, *, pipeline_id: str, path: str, approved: bool, answer_id: str | None, as_json: bool
) -> None:
    """Answer the step PATH of a pipeline, which waits for it."""
    with connection.connect() as client:
        step = client.pipelines.answer(pipeline_id, path, approved=approved, answer_id=answer_id or "")
    write_json(step) if as_json else write_line(described(step, step.path))


@pipeline.command()
@click.argument("pipeline_ids", metavar="PIPELINE_ID...", nargs=-1, required=True)
@click.option("--reason", default="", help="Reason for people. The pipeline's error shows it.")
@json_option
@connection_options
def cancel(connection: Connection, *, pipeline_ids: tuple[str, ...], reason: str, as_json: bool) -> None:
    """Request that pipelines stop. What their jobs have generated is kept."""
    with connection.connect() as client:
        cancel_each(
            pipeline_ids,
            lambda pipeline_id: client.pipelines.cancel(pipeline_id, reason),
            lambda status: state_of(status) if status.root.HasField("end_time") else "",
            as_json=as_json,
        )


def _row(status: "PipelineStatus") -> tuple[str, ...]:
    return (
        status.pipeline_id,
        status.name,
        state_of(status) if status.user_id or status.root.HasField("end_time") else NO_ANSWER,
        f"{status.root.counts.succeeded}/{status.root.counts.total}",
        status.user_id,
        age(status.root.start_time.ToDatetime()),
    )


def spec_of(name: str, spec: Any, argument: str = "SPEC") -> dict[str, Any]:
    """Return the fields of PipelineRequest that say what to run. Raises CommandError with the name of the argument."""
    # The import of a type is what makes it known.
    from google.protobuf import (
        json_format,
        struct_pb2,  # noqa: F401
        wrappers_pb2,  # noqa: F401
    )

    from llm_pb.pipeline_pb2 import PipelineRequest

    try:
        read = json.loads(spec)
        request = PipelineRequest()
        known = {field.name for field in PipelineRequest.DESCRIPTOR.oneofs_by_name["spec"].fields} - {"custom"}
        fields = {name: read} if name in known else {"custom": {"name": name, "input": read}}
        if name not in known and not isinstance(read, dict):
            raise TypeError("no Any")
        json_format.ParseDict(fields, request)
    except (AttributeError, KeyError, TypeError) as error:
        # As protobuf's own for an Any whose "@type" is no text, or that has no value.
        raise CommandError(f'{argument}: must be an object with "@type" and the JSON of that type') from error
    except (ValueError, RecursionError, json_format.ParseError) as error:
        raise CommandError(f"{argument}: {visible(str(error))}") from error
    return {descriptor.name: value for descriptor, value in request.ListFields()}


def in_tree_order(steps: "Sequence[StepStatus]") -> "list[StepStatus]":
    """Return steps that come in the order in which they began, each below its parent."""
    places = {step.path: place for place, step in enumerate(steps)}

    def key(step: "StepStatus") -> list[int]:
        parts = step.path.split("/")
        return [places.get("/".join(parts[: depth + 1]), 0) for depth in range(len(parts))]

    return sorted(steps, key=key)
