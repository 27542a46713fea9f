"""`make secrets`: creates the secrets of compose.yaml and compose.encryption.yaml, in files next to them.

Files that exist stay.

Only the owner of the folder can reach its files. They are readable for everybody inside it, because Compose mounts each
one by itself, and the containers run as users of their own.
"""

import base64
import os
import secrets
import stat
import sys
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Final

import nkeys
import trustme

from encryption.keyring import with_new_key

FOLDER: Final = Path(__file__).parent / "secrets"
_NATS: Final = "nats"
"""The name of NATS in the network of compose.yaml."""
_NKEYS: Final = ("gateway", "gpu-worker", "notifier", "operator")
"""The roles that deploy/nats/nats-server.conf knows."""
_TLS: Final = ("ca.pem", f"{_NATS}.pem", f"{_NATS}.key")
_READABLE: Final = stat.S_IRUSR | stat.S_IRGRP | stat.S_IROTH


class EmptySecretError(Exception):
    """A file that should hold a secret is empty. It may be a copy that went wrong."""


def create_secrets(folder: Path) -> list[str]:
    """Create the files that do not exist yet in the folder, and return their names.

    Raises EmptySecretError, and creates nothing, where one that exists is empty.
    """
    folder.mkdir(mode=stat.S_IRWXU, parents=True, exist_ok=True)
    for name in (*_TEXTS, *_TLS, *(f"{role}.nk" for role in _NKEYS)):
        if (folder / name).exists() and not (folder / name).read_bytes().strip():
            raise EmptySecretError(f"{folder / name} is empty: restore it, or remove it and it is made anew")
    made = [name for name, make in _TEXTS.items() if _write(folder / name, make)]
    # The CA's own key is not kept: certificate and CA are replaced together.
    if not all((folder / name).exists() for name in _TLS):
        for name, text in _new_certificate().items():
            (folder / name).unlink(missing_ok=True)
            _write(folder / name, partial(str, text))
            made.append(name)
    for role in _NKEYS:
        if _write(folder / f"{role}.nk", _new_seed):
            made.append(f"{role}.nk")
    public = {role: nkeys.from_seed((folder / f"{role}.nk").read_bytes()).public_key.decode() for role in _NKEYS}
    lines = "".join(f"NATS_{role.upper().replace('-', '_')}_NKEY={key}\n" for role, key in public.items())
    (folder / "nats.env").unlink(missing_ok=True)
    _write(folder / "nats.env", partial(str, lines))
    return made


def _password() -> str:
    return secrets.token_urlsafe(32)


def _session_key() -> str:
    return base64.b64encode(os.urandom(32)).decode() + "\n"


def _keyring() -> str:
    _, text = with_new_key({})
    return text


def _new_seed() -> str:
    seed: bytes = nkeys.encode_seed(os.urandom(32), nkeys.PREFIX_BYTE_USER)
    return seed.decode()


def _new_certificate() -> Mapping[str, str]:
    ca = trustme.CA()
    issued = ca.issue_cert(_NATS, "localhost", common_name=_NATS)
    chain = b"".join(part.bytes() for part in issued.cert_chain_pems)
    files = zip(_TLS, (ca.cert_pem.bytes(), chain, issued.private_key_pem.bytes()), strict=True)
    return {name: data.decode() for name, data in files}


_TEXTS: Final[Mapping[str, Callable[[], str]]] = {
    "postgres-password": _password,
    "grafana-password": _password,
    "page-token-key": _password,
    "session-keys": _session_key,
    "keyring.json": _keyring,
}


def _write(path: Path, make: Callable[[], str]) -> bool:
    """Write a file unless it exists, and return whether it did not."""
    if path.exists():
        return False
    # One that is broken off leaves no file that would count as the secret.
    draft = path.with_name(f".{path.name}")
    draft.unlink(missing_ok=True)
    draft.touch(mode=stat.S_IRUSR | stat.S_IWUSR)
    draft.write_text(make())
    draft.chmod(_READABLE)
    draft.rename(path)
    return True


if __name__ == "__main__":
    where = Path(sys.argv[1]) if len(sys.argv) > 1 else FOLDER
    try:
        for created in create_secrets(where):
            print(f"{where / created}")
    except EmptySecretError as error:
        sys.exit(str(error))
