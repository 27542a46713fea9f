"""Commands about the service: models, workers, quota."""

import sys
from typing import TYPE_CHECKING, Any, Final

import click
from click.core import ParameterSource

from durable_llm._enums import name_of
from durable_llm.cli._connection import Connection
from durable_llm.cli._options import NAME, connection_options, json_option
from durable_llm.cli._stdout import write_json, write_line, write_table
from durable_llm.cli._text import age

if TYPE_CHECKING:
    from collections.abc import Sequence

    from llm_pb.llm_pb2 import TrainedModel


_MAX_DIGITS: Final = 9


@click.group(invoke_without_command=True)
@click.option("--trained", is_flag=True, help="List the versions of the models that your tenant has trained instead.")
@json_option
@connection_options
@click.pass_context
def models(context: click.Context, connection: Connection, *, trained: bool, as_json: bool) -> None:
    """List the models that a job may name, or change those that your tenant has trained."""
    if context.invoked_subcommand is not None:
        given = [item for item in context.params if context.get_parameter_source(item) is ParameterSource.COMMANDLINE]
        if given:
            raise click.UsageError(f"Give options behind `{context.invoked_subcommand}`.")
        return
    if trained:
        with connection.connect() as client:
            _write_trained(client.trained_models(), as_json=as_json)
        return
    with connection.connect() as client:
        found = client.models()
    if as_json:
        for model in found:
            write_json(model)
        return
    from durable_llm._prices import price_text

    rows = [
        (
            model.name,
            "available" if model.available else "no worker",
            str(model.context_tokens),
            str(model.max_output_tokens),
            "yes" if model.structured_output else "no",
            str(model.backlog),
            price_text(model.price) if model.HasField("price") else "",
        )
        for model in found
    ]
    write_table(("MODEL", "STATE", "CONTEXT", "MAX OUTPUT", "STRUCTURED", "BACKLOG", "PRICE"), rows)


@models.command()
@click.argument("model", type=NAME)
@click.argument("name", type=NAME)
@click.argument("version", type=click.IntRange(min=0, max=2**31 - 1))
@json_option
@connection_options
def alias(connection: Connection, *, model: str, name: str, version: int, as_json: bool) -> None:
    """Point the alias NAME of a trained model at VERSION. 0 removes the alias.

    Workers follow when they start again.
    """
    with connection.connect() as client:
        _write_trained([client.set_model_alias(model, name, version)], as_json=as_json)


@models.command()
@click.argument("version", metavar="MODEL@VERSION", type=NAME)
@click.option("-y", "--yes", is_flag=True, help="Do not ask.")
@connection_options
def rm(connection: Connection, *, version: str, yes: bool) -> None:
    """Remove a version of a trained model, which no alias but "latest" names."""
    model, _, number = version.rpartition("@")
    if not model or not number.isascii() or not number.isdigit() or len(number) > _MAX_DIGITS:
        raise click.UsageError("VERSION must be MODEL@NUMBER, such as weather@3.")
    if not yes:
        if not sys.stdin.isatty():
            raise click.UsageError("Nobody can be asked here: --yes removes without a question.")
        click.confirm(f"Remove {version} for good?", abort=True, err=True)
    with connection.connect() as client:
        client.delete_model_version(model, int(number))
    write_line(f"{version} removed")


def _write_trained(models: "Sequence[TrainedModel]", *, as_json: bool) -> None:
    if as_json:
        for model in models:
            write_json(model)
        return
    rows = [
        (
            f"{model.name}@{version.version}",
            " ".join(sorted(alias for alias, number in model.aliases.items() if number == version.version)),
            version.base_model,
            f"{version.loss:.4f}",
            f"{version.base_loss:.4f}",
            age(version.create_time.ToDatetime()),
            version.pipeline_id,
        )
        for model in models
        for version in model.versions
    ]
    write_table(("MODEL", "ALIASES", "BASE", "LOSS", "LOSS OF BASE", "AGE", "PIPELINE"), rows)


@click.command()
@click.option("--model", type=NAME, help="List only the workers that serve this model. [default: all]")
@json_option
@connection_options
def workers(connection: Connection, *, model: str | None, as_json: bool) -> None:
    """List the GPU workers, and how full each is. For operators."""
    with connection.connect() as client:
        found = client.workers(model or "")
    if as_json:
        for worker in found:
            write_json(worker)
        return
    from llm_pb.llm_pb2 import WorkerState

    rows = [
        (
            worker.worker,
            worker.model,
            name_of(WorkerState, worker.state, "WORKER_STATE_"),
            f"{worker.seats_in_use}/{worker.seats}",
            f"{worker.running_sequences}+{worker.waiting_sequences}",
            f"{worker.kv_cache_usage:.0%}" if worker.HasField("kv_cache_usage") else "",
            f"{worker.tokens_per_second:.0f}",
            worker.gpu.name,
            age(worker.start_time.ToDatetime()),
            age(worker.report_time.ToDatetime()),
        )
        for worker in found
    ]
    header = ("WORKER", "MODEL", "STATE", "SEATS", "RUNNING+WAITING", "KV CACHE", "TOKENS/S", "GPU", "AGE", "REPORTED")
    write_table(header, rows)


@click.command()
@json_option
@connection_options
def quota(connection: Connection, *, as_json: bool) -> None:
    """Show the quotas of your tenant and how much of them is in use."""
    with connection.connect() as client:
        found = client.quota()
    if as_json:
        write_json(found)
        return
    write_line(f"tenant     {found.tenant or 'none: the installation itself, without quotas'}")
    if found.HasField("requests"):
        requests = found.requests
        write_line(
            f"requests   {requests.per_second:g} a second, {requests.available} of {requests.burst} at once left"
        )
    if found.HasField("open_jobs"):
        write_line(f"open jobs  {found.open_jobs.used} of {found.open_jobs.limit}")
    if found.HasField("output_tokens"):
        tokens = found.output_tokens
        write_line(f"tokens     {tokens.used} used, {tokens.reserved} reserved of {tokens.limit_per_day} a day of UTC")
    if found.HasField("files"):
        files = found.files
        write_line(f"files      {files.used_files}{_of(files, 'limit_files')}")
        write_line(f"bytes      {files.used_bytes}{_of(files, 'limit_bytes')}")


def _of(quota: Any, limit: str) -> str:
    return f" of {getattr(quota, limit)}" if quota.HasField(limit) else ""
