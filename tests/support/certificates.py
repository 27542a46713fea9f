"""Certificates on disk, of CAs created for the test."""

import os
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import grpc
import trustme
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

HOST = "127.0.0.1"


@dataclass
class Authority:
    """A CA, whose certificate is a file."""

    folder: Path
    name: str = "ca"
    ca: trustme.CA = field(default_factory=trustme.CA)

    def __post_init__(self) -> None:
        self.path.write_bytes(self.pem)

    @property
    def path(self) -> Path:
        return self.folder / f"{self.name}.pem"

    @property
    def pem(self) -> bytes:
        return self.ca.cert_pem.bytes()

    def issue(self, name: str, *, valid_for: timedelta = timedelta(days=1)) -> "Pair":
        """Write a certificate for the loopback address and its key, in the place of earlier ones of that name."""
        issued = self.ca.issue_cert(HOST, "localhost", common_name=name, not_after=datetime.now(UTC) + valid_for)
        pair = Pair(self.folder / f"{name}.pem", self.folder / f"{name}.key")
        replace(pair.cert, b"".join(part.bytes() for part in issued.cert_chain_pems))
        replace(pair.key, issued.private_key_pem.bytes())
        return pair

    def issue_spiffe(self, name: str, spiffe_id: str) -> "Pair":
        """Write a client's certificate with a SPIFFE id, which trustme cannot issue, and its key."""
        key = ec.generate_private_key(ec.SECP256R1())
        issuer = x509.load_pem_x509_certificate(self.pem)
        signer: Any = serialization.load_pem_private_key(self.ca.private_key_pem.bytes(), None)
        names = x509.SubjectAlternativeName([x509.UniformResourceIdentifier(spiffe_id)])
        certificate = (
            x509.CertificateBuilder()
            .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)]))
            .issuer_name(issuer.subject)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(datetime.now(UTC) - timedelta(days=1))
            .not_valid_after(datetime.now(UTC) + timedelta(days=1))
            .add_extension(names, critical=False)
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer.public_key()), critical=False)
            .sign(signer, hashes.SHA256())
        )
        pair = Pair(self.folder / f"{name}.pem", self.folder / f"{name}.key")
        pair.cert.write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
        pair.key.write_bytes(
            key.private_bytes(
                serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
            )
        )
        return pair


@dataclass(frozen=True)
class Pair:
    """A certificate and its key."""

    cert: Path
    key: Path

    def environment(self, prefix: str, client_ca: Authority | None = None) -> dict[str, str]:
        """Return the settings of a listener."""
        ca = {f"{prefix}CLIENT_CA": str(client_ca.path)} if client_ca else {}
        return {f"{prefix}CERT": str(self.cert), f"{prefix}KEY": str(self.key), **ca}


def credentials(ca: Authority, client: Pair | None = None) -> grpc.ChannelCredentials:
    """Return the credentials of a gRPC client that trusts the CA."""
    if client is None:
        return grpc.ssl_channel_credentials(ca.pem)
    return grpc.ssl_channel_credentials(ca.pem, client.key.read_bytes(), client.cert.read_bytes())


def replace(path: Path, data: bytes) -> None:
    """Replace a file by a rename, as certificate managers do, so that nobody reads half of it."""
    new = path.with_suffix(".new")
    new.write_bytes(data)
    os.replace(new, path)
