"""Commands about files: files put, get, ls, rm."""

import contextlib
import itertools
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING

import click

from durable_llm._enums import name_of
from durable_llm.cli._connection import Connection
from durable_llm.cli._exits import CommandError, Exit, Interrupted
from durable_llm.cli._interrupts import interruptible
from durable_llm.cli._jobs_to_submit import user_of
from durable_llm.cli._listing import for_each, limit_option
from durable_llm.cli._options import NAME, Duration, connection_options, json_option, require_text_name
from durable_llm.cli._progress import Progress
from durable_llm.cli._stdout import write_bytes, write_json, write_line, write_table
from durable_llm.cli._text import age

if TYPE_CHECKING:
    from llm_pb.file_pb2 import File


@click.group()
def files() -> None:
    """Upload, download, list and remove files."""


@files.command()
@click.argument("paths", metavar="PATH...", nargs=-1, required=True, type=click.Path(exists=True, dir_okay=False))
@click.option("--user", type=NAME, help="User whose files they are. [default: your login name]")
@click.option("--purpose", default="user_data", show_default=True, help="A label: batch, vision, user_data ...")
@click.option("--media-type", default="", help="As in HTTP: application/jsonl.")
@click.option("--expires", type=Duration(), help="Remove them after this time. [default: the service's]")
@click.option("--request-id", type=NAME, help="Key by which a repeat of the command goes on with its upload.")
@json_option
@connection_options
def put(
    connection: Connection,
    *,
    paths: tuple[str, ...],
    user: str | None,
    purpose: str,
    media_type: str,
    expires: timedelta | None,
    request_id: str | None,
    as_json: bool,
) -> None:
    """Upload files and print their ids. An upload that breaks goes on where it broke."""
    if request_id and len(paths) > 1:
        raise click.UsageError("--request-id is the key of one file.")
    for path in paths:
        require_text_name("PATH", path)
    come_back = "The upload has ended. The same command goes on with it." if request_id else "The upload has ended."
    expire_time = datetime.now(UTC) + expires if expires is not None else None
    progress = Progress(quiet=False)
    try:
        with connection.connect() as client, interruptible(), progress:
            for path in paths:
                file = client.files.upload(
                    path,
                    user_id=user_of(user, connection.settings),
                    request_id=request_id or "",
                    purpose=purpose,
                    media_type=media_type,
                    expire_time=expire_time,
                )
                progress.answered()
                write_json(file) if as_json else write_line(file.ref.file_id)
    except KeyboardInterrupt:
        raise Interrupted(come_back) from None


@files.command()
@click.argument("file_id")
@click.argument("path", default="", type=click.Path())
@connection_options
def get(connection: Connection, *, file_id: str, path: str) -> None:
    """Download a file to PATH; `-`: to standard output. [default: the name that it was uploaded with, here]"""
    progress = Progress(quiet=False)
    try:
        with connection.connect() as client, interruptible(), progress:
            if path == "-":
                for piece in client.files.content(file_id):
                    write_bytes(piece)
                return
            if not path:
                # The uploader has chosen the name: it must not lead out of this folder, nor replace a file.
                path = Path(client.files.get(file_id).filename).name or file_id
                if Path(path).exists():
                    raise CommandError(f"{path} exists: name another path", Exit.USAGE)
            if not (folder := Path(path).resolve().parent).is_dir():
                raise CommandError(f"{path}: there is no folder {folder}", Exit.USAGE)
            file = client.files.download(file_id, path)
    except KeyboardInterrupt:
        raise Interrupted("The download has ended before the file was whole.") from None
    write_line(f"{path} {file.ref.size_bytes} bytes")


@files.command()
@click.option("--user", "user_id", type=NAME, help="Only files of this user.")
@click.option("--purpose", default="", help="Only files with this purpose.")
@limit_option
@click.option("-q", "--quiet", is_flag=True, help="Print the ids alone.")
@json_option
@connection_options
def ls(connection: Connection, *, user_id: str | None, purpose: str, limit: int, quiet: bool, as_json: bool) -> None:
    """List files, the newest first."""
    with (
        connection.connect() as client,
        contextlib.closing(
            client.files.list(user_id=user_id or "", purpose=purpose, page_size=min(limit, 100) or 100)
        ) as found,
    ):
        listed = itertools.islice(found, limit or None)
        if as_json or quiet:
            for file in listed:
                write_json(file) if as_json else write_line(file.ref.file_id)
            return
        rows = [_row(file) for file in listed]
    write_table(("FILE ID", "STATE", "BYTES", "PURPOSE", "USER", "AGE", "NAME"), rows)


@files.command()
@click.argument("file_ids", metavar="FILE_ID...", nargs=-1, required=True)
@click.option("-y", "--yes", is_flag=True, help="Do not ask.")
@connection_options
def rm(connection: Connection, *, file_ids: tuple[str, ...], yes: bool) -> None:
    """Remove files."""
    if not yes:
        if not sys.stdin.isatty():
            raise click.UsageError("Nobody can be asked here: --yes removes without a question.")
        click.confirm(f"Remove {', '.join(file_ids)} for good?", abort=True, err=True)
    with connection.connect() as client:

        def remove(file_id: str) -> None:
            client.files.delete(file_id)
            write_line(f"{file_id} removed")

        for_each(file_ids, remove)


def _row(file: "File") -> tuple[str, ...]:
    from llm_pb.file_pb2 import FileState

    return (
        file.ref.file_id,
        name_of(FileState, file.state, "FILE_STATE_").lower(),
        str(max(file.committed_bytes, file.ref.size_bytes)),
        file.purpose,
        file.user_id,
        age(file.create_time.ToDatetime()),
        file.filename,
    )
