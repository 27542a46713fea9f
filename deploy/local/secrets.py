"""The CA, the certificates and the NKeys of a stack with TLS. Each start creates new ones, for this machine only."""

import os
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Final

import nkeys
import trustme

from deploy.local.ports import HOST

_CERTIFICATES: Final = ("nats", "codec", "gateway", "gpu-worker", "notifier", "trainer", "http")
_NKEYS: Final = ("gateway", "gpu-worker", "notifier", "operator")
"""The roles that deploy/nats/nats-server.conf knows."""


class Secrets:
    """The files of a stack's TLS and NKeys, in a folder of its state."""

    def __init__(self, folder: Path) -> None:
        """Only write() writes files."""
        self._folder = folder
        self._seeds = {role: nkeys.encode_seed(os.urandom(32), nkeys.PREFIX_BYTE_USER) for role in _NKEYS}

    @property
    def ca(self) -> Path:
        """The file of the CA's certificate."""
        return self._folder / "ca.pem"

    def server(self, kind: str, prefix: str) -> Mapping[str, str]:
        """Return the settings of a listener of a kind of process. Their names begin with the prefix."""
        return {f"{prefix}CERT": str(self._folder / f"{kind}.pem"), f"{prefix}KEY": str(self._folder / f"{kind}.key")}

    def nats_client(self, role: str, prefix: str) -> Mapping[str, str]:
        """Return the settings with which a role connects to NATS. Their names begin with the prefix."""
        return {f"{prefix}TLS_CA": str(self.ca), f"{prefix}NKEY_SEED": str(self._folder / f"{role}.nk")}

    def nats_public_keys(self) -> Mapping[str, str]:
        """Return the variables of deploy/nats/nats-server.conf for the roles' public keys."""
        return {
            f"NATS_{role.upper().replace('-', '_')}_NKEY": nkeys.from_seed(seed).public_key.decode()
            for role, seed in self._seeds.items()
        }

    def write(self) -> None:
        """Replace the files of the last start. Only the owner can read them."""
        self._folder.mkdir(mode=stat.S_IRWXU, exist_ok=True)
        ca = trustme.CA()
        self._write("ca.pem", ca.cert_pem.bytes())
        for kind in _CERTIFICATES:
            issued = ca.issue_cert(HOST, "localhost", common_name=kind)
            self._write(f"{kind}.pem", b"".join(part.bytes() for part in issued.cert_chain_pems))
            self._write(f"{kind}.key", issued.private_key_pem.bytes())
        for role, seed in self._seeds.items():
            self._write(f"{role}.nk", seed)

    def _write(self, name: str, data: bytes) -> None:
        path = self._folder / name
        path.unlink(missing_ok=True)
        path.touch(mode=stat.S_IRUSR | stat.S_IWUSR)
        path.write_bytes(data)
