"""Commands that run a job and read its text: submit, watch, output."""

from datetime import timedelta
from typing import Any

import click

from durable_llm.cli._connection import Connection
from durable_llm.cli._follow import follow, wait
from durable_llm.cli._jobs_to_submit import content_of, job_for, target_of
from durable_llm.cli._options import (
    NAME,
    ClassName,
    Duration,
    WholeNumber,
    connection_options,
    json_option,
    quiet_option,
    read_text,
    sampling_options,
)
from durable_llm.cli._progress import Progress
from durable_llm.cli._stdout import write, write_json, write_line
from durable_llm.cli._submitting import submitting
from durable_llm.cli._text import say


@click.command()
@click.argument("prompt", required=False)
@click.option("-f", "--file", type=click.Path(), help="Read the prompt from a file, as it stands.")
@click.option(
    "--messages",
    type=click.Path(),
    help='Read a conversation from a JSON file: [{"role": "user", "content": "Hello"}].',
)
@click.option("-m", "--model", type=NAME, help="Model that answers.")
@sampling_options
@click.option("--json-schema", "schema", type=click.Path(), help="File with a JSON Schema that the output follows.")
@click.option("--regex", help="Regular expression that the output matches.")
@click.option("--choice", multiple=True, help="One of the texts that the output may be. May be repeated.")
@click.option("--logprobs", type=WholeNumber(), help="Report this many log probabilities of each token, in the result.")
@click.option("--user", type=NAME, help="User whom the job is for. [default: your login name]")
@click.option("--project", type=NAME, help="Label to group and list jobs by.")
@click.option("--request-id", type=NAME, help="Idempotency key: a repeat finds the first job. [default: a random one]")
@click.option("--priority", type=WholeNumber(), default=0, help="1 (first) to 5 (last).")
@click.option("--class", "job_class", type=ClassName(), help="How urgent it is. [default: standard]")
@click.option(
    "--notify",
    type=NAME,
    multiple=True,
    help="Deliver the outcome: URL, nats:SUBJECT, kafka:TOPIC, postgres:TABLE.",
)
@click.option("--timeout", type=Duration(), help="Time limit of the whole job, such as 90s, 5m or 1h30m.")
@click.option("--cache", type=Duration(), help="Take the answer of an equal job if it is not older, and keep its own.")
@click.option("-w", "--watch", is_flag=True, help="Print the text as it is generated.")
@quiet_option
@json_option
@connection_options
def submit(
    connection: Connection,
    *,
    prompt: str | None,
    file: str | None,
    messages: str | None,
    sampling: dict[str, Any],
    schema: str | None,
    regex: str | None,
    choice: tuple[str, ...],
    logprobs: int | None,
    notify: tuple[str, ...],
    timeout: timedelta | None,
    cache: timedelta | None,
    watch: bool,
    quiet: bool,
    as_json: bool,
    **fields: Any,
) -> None:
    """Submit a job for PROMPT (`-`: standard input) and print its id, or with --watch its text."""
    forms = {
        "json_schema": read_text(schema, "--json-schema") if schema is not None else None,
        "regex": regex,
        "choice": {"options": choice} if choice else None,
    }
    chosen = {name: value for name, value in forms.items() if value is not None}
    if len(chosen) > 1:
        raise click.UsageError("Give at most one of --json-schema, --regex and --choice.")
    params = {**sampling, **chosen, **({"logprobs": logprobs} if logprobs is not None else {})}
    content = content_of(prompt, file, messages)
    targets = [target_of(target) for target in notify]
    if cache is not None:
        fields["cache"] = {"ttl": cache}
    request = job_for(connection, params=params, timeout=timeout, notify=targets, **content, **fields)
    progress = Progress(quiet=quiet)
    with connection.connect() as client:
        with submitting("Submit", request.request_id), progress:
            job = client.submit(request)
        if not watch:
            if as_json:
                write_json({"workflowId": job.workflow_id})
            else:
                write_line(job.workflow_id)
            return
        if not quiet and not as_json:
            say(job.workflow_id)
        follow(job, accepted=True, as_json=as_json, quiet=quiet)


@click.command()
@click.argument("workflow_id")
@click.option("--resume-token", default="", help="Print only what follows the text that this token stands for.")
@quiet_option
@json_option
@connection_options
def watch(connection: Connection, *, workflow_id: str, resume_token: str, quiet: bool, as_json: bool) -> None:
    """Print the text of a job as it is generated, from its start.

    A connection that breaks continues where it broke.
    """
    with connection.connect() as client:
        job = client.job(workflow_id)
        follow(job, accepted=False, resume_token=resume_token, as_json=as_json, quiet=quiet)


@click.command()
@click.argument("workflow_id")
@click.option("--partial", is_flag=True, help="Print what a job has generated that did not succeed, too.")
@quiet_option
@json_option
@connection_options
def output(connection: Connection, *, workflow_id: str, partial: bool, quiet: bool, as_json: bool) -> None:
    """Wait for the end of a job and print its text alone, or with --json its result."""
    from durable_llm import JobError

    with connection.connect() as client:
        try:
            result = wait(client.job(workflow_id), quiet=quiet)
        except JobError as error:
            if partial:
                _print_result(error.result, as_json=as_json)
            raise
        _print_result(result, as_json=as_json)


def _print_result(result: Any, *, as_json: bool) -> None:
    if as_json:
        write_json(result)
    else:
        write(result.output)
