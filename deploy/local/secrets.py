"""The CA, the certificates and the NKeys of a stack with TLS: made anew at each start, for this machine alone."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Final

import nkeys
import trustme

from deploy.local.ports import HOST

_CERTIFICATES: Final = ("nats", "codec", "gateway", "gpu-worker", "notifier")
_NKEYS: Final = ("gateway", "gpu-worker", "notifier", "operator")
"""The roles that deploy/nats/nats-server.conf knows."""


class Secrets:
    """What makes a stack's connections private, in a folder of its state."""

    def __init__(self, folder: Path) -> None:
        """Nothing is written before write()."""
        self._folder = folder
        self._seeds = {role: nkeys.encode_seed(os.urandom(32), nkeys.PREFIX_BYTE_USER) for role in _NKEYS}

    @property
    def ca(self) -> Path:
        """The certificate of the CA."""
        return self._folder / "ca.pem"

    def server(self, kind: str, prefix: str) -> Mapping[str, str]:
        """Return the settings, named with a prefix, of the certificate of a kind of process."""
        return {f"{prefix}CERT": str(self._folder / f"{kind}.pem"), f"{prefix}KEY": str(self._folder / f"{kind}.key")}

    def nats_client(self, role: str, prefix: str) -> Mapping[str, str]:
        """Return the settings, named with a prefix, by which a role connects to NATS."""
        return {f"{prefix}TLS_CA": str(self.ca), f"{prefix}NKEY_SEED": str(self._folder / f"{role}.nk")}

    def nats_public_keys(self) -> Mapping[str, str]:
        """Return the variables of deploy/nats/nats-server.conf that hold the roles' public keys."""
        return {
            f"NATS_{role.upper().replace('-', '_')}_NKEY": nkeys.from_seed(seed).public_key.decode()
            for role, seed in self._seeds.items()
        }

    def write(self) -> None:
        """Write all files, in the place of those of the last start. The folder's folder is the owner's alone."""
        self._folder.mkdir(exist_ok=True)
        ca = trustme.CA()
        ca.cert_pem.write_to_path(self.ca)
        for kind in _CERTIFICATES:
            made = ca.issue_cert(HOST, "localhost", common_name=kind)
            (self._folder / f"{kind}.pem").write_bytes(b"".join(part.bytes() for part in made.cert_chain_pems))
            made.private_key_pem.write_to_path(self._folder / f"{kind}.key")
        for role, seed in self._seeds.items():
            (self._folder / f"{role}.nk").write_bytes(seed)
