"""`python -m services.gateway.keys`: make, list and revoke the API keys of a gateway, in the file that it watches."""

import argparse
import os
import sys
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Final, NoReturn

from pydantic import TypeAdapter, ValidationError

from encryption import durable_file
from jobs.ids import ID_PATTERN
from runtime.auth_keys import ApiKey, KeyFileError, make_key, read_keys, write_keys
from runtime.scopes import CANCEL, READ, READ_MODELS, SCOPES, SUBMIT
from runtime.tenants import check_tenant

_FILE_VARIABLE: Final = "GATEWAY_API_KEYS_FILE"
_DEFAULT_SCOPES: Final = (SUBMIT, READ, CANCEL, READ_MODELS)


def main(arguments: Sequence[str] | None = None) -> None:
    """Do what the command line says. Exits with 1 and a line on stderr for what cannot be done."""
    asked = _parser().parse_args(arguments)
    if asked.file is None:
        _fail(f"name the file of the keys: --file or {_FILE_VARIABLE}")
    if not asked.file.parent.is_dir():
        _fail(f"there is no folder {asked.file.parent} for the file of the keys, {asked.file}")
    try:
        with durable_file.locked(asked.file.parent):
            asked.run(asked)
    except (KeyFileError, OSError) as error:
        _fail(str(error))


def _create(asked: argparse.Namespace) -> None:
    text, id_, digest = make_key()
    keys = _read(asked.file)
    keys[id_] = ApiKey(
        id=id_,
        sha256=digest,
        scopes=tuple(asked.scopes),
        tenant=asked.tenant or "",
        user_id=asked.user or "",
        not_after=asked.expires,
    )
    write_keys(asked.file, keys.values())
    sys.stdout.write(f"{text}\n")
    sys.stderr.write("This is the only time that the key is shown.\n")


def _list(asked: argparse.Namespace) -> None:
    for key in _read(asked.file).values():
        until = key.not_after.isoformat() if key.not_after else "never expires"
        sys.stdout.write(
            f"{key.id}  {key.tenant or 'no tenant'}  {key.user_id or 'all users'}  {until}  {','.join(key.scopes)}\n"
        )


def _revoke(asked: argparse.Namespace) -> None:
    keys = _read(asked.file)
    if keys.pop(asked.id, None) is None:
        _fail(f"there is no key {asked.id}")
    write_keys(asked.file, keys.values())


def _read(path: Path) -> dict[str, ApiKey]:
    return read_keys(path, SCOPES) if path.exists() else {}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m services.gateway.keys", description=__doc__)
    file = os.environ.get(_FILE_VARIABLE)
    parser.add_argument("--file", type=Path, default=Path(file) if file else None, help=f"default: {_FILE_VARIABLE}")
    commands = parser.add_subparsers(required=True)
    create = commands.add_parser("create", help="make a key and print it, once")
    default = ",".join(_DEFAULT_SCOPES)
    create.add_argument("--scopes", type=_scopes, default=default, help=f"with commas between; default: {default}")
    create.add_argument("--tenant", type=_tenant, help="the tenant whose jobs the key is for; default: none")
    create.add_argument("--user", type=_user, help="the one user_id whose jobs the key is for; default: all users")
    create.add_argument("--expires", type=_time, help="an ISO 8601 time with its zone, or a duration from now: P90D")
    create.set_defaults(run=_create)
    commands.add_parser("list", help="show the ids of the keys and what they may do").set_defaults(run=_list)
    revoke = commands.add_parser("revoke", help="take a key out of the file")
    revoke.add_argument("id", help="the part of the key between llmk_ and the next _")
    revoke.set_defaults(run=_revoke)
    return parser


def _scopes(text: str) -> tuple[str, ...]:
    scopes = tuple(text.split(","))
    if unknown := sorted({*scopes} - SCOPES):
        raise argparse.ArgumentTypeError(
            f"there is no scope {', '.join(unknown)}; choose of {', '.join(sorted(SCOPES))}"
        )
    return scopes


def _tenant(text: str) -> str:
    try:
        return check_tenant(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def _user(text: str) -> str:
    if not ID_PATTERN.fullmatch(text):
        raise argparse.ArgumentTypeError("is no user_id: see llm.proto")
    return text


def _time(text: str) -> datetime:
    now = datetime.now(UTC)
    try:
        if text.startswith("P"):
            time = now + TypeAdapter(timedelta).validate_python(text)
        else:
            time = datetime.fromisoformat(text)
    except (ValidationError, ValueError, OverflowError) as error:
        raise argparse.ArgumentTypeError("is neither an ISO 8601 time nor a duration") from error
    if time.tzinfo is None:
        raise argparse.ArgumentTypeError("lacks its zone: 2027-01-31T00:00:00Z")
    if time <= now:
        raise argparse.ArgumentTypeError("is over already")
    return time


def _fail(message: str) -> NoReturn:
    sys.stderr.write(f"{message}\n")
    sys.exit(1)


if __name__ == "__main__":
    main()
