"""Client certificates: a caller by the SPIFFE id in the certificate that the TLS handshake has verified."""

from __future__ import annotations

import re
from collections.abc import Sequence
from datetime import datetime
from functools import lru_cache
from typing import Final, Self

from cryptography import x509
from pydantic import BaseModel, ConfigDict, model_validator

from runtime.auth import Caller, Presented, check_expiry, credential_invalid, credential_missing
from runtime.tenants import TenantName, check_tenant

PROXY: Final = "proxy"
"""The scope of a proxy. It sends the credentials of its callers and has no rights itself."""
_TENANT: Final = "tenant"
"""The group of a pattern that matches the tenant's name."""
_SPIFFE: Final = "spiffe://"


class CertificateRule(BaseModel):
    """The scopes and the tenant of certificates whose SPIFFE id matches a pattern."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    pattern: re.Pattern[str]
    """Regular expression for the whole id."""
    scopes: frozenset[str]
    tenant: TenantName | None = None
    """The tenant of all these certificates. None: the tenant that the pattern's group `tenant` matches, or none without
    such a group."""

    @model_validator(mode="after")
    def _names_one_tenant(self) -> Self:
        if self.tenant is not None and _TENANT in self.pattern.groupindex:
            raise ValueError("the tenant comes from the pattern's group or from the rule, not from both")
        return self

    def tenant_of(self, match: re.Match[str]) -> str:
        """Return the tenant of a certificate whose id has matched. Raises Refusal for an invalid name in the id."""
        if _TENANT not in self.pattern.groupindex:
            return self.tenant or ""
        try:
            return check_tenant(match[_TENANT] or "")
        except ValueError as error:
            raise credential_invalid(f"the client certificate's SPIFFE id names no tenant: {error}") from None


class ClientCertificates:
    """The Authenticator of client certificates."""

    hint = "a client certificate"

    def __init__(self, rules: Sequence[CertificateRule]) -> None:
        """The first rule that an id matches applies."""
        self._rules = rules

    async def authenticate(self, presented: Presented) -> Caller | None:
        """See Authenticator."""
        if presented.certificate is None:
            return None
        spiffe_id, not_after = _read(presented.certificate)
        for rule in self._rules:
            if (match := rule.pattern.fullmatch(spiffe_id)) is None:
                continue
            if PROXY in rule.scopes:
                raise credential_missing(
                    "this is the certificate of a proxy: it must send the credential of its caller"
                )
            caller = Caller(rule.tenant_of(match), spiffe_id, rule.scopes, spiffe_id, not_after=not_after)
            check_expiry(caller)
            return caller
        raise credential_invalid("no rule matches the client certificate's SPIFFE id")

    def check(self, caller: Caller) -> None:
        """See Authenticator."""
        check_expiry(caller)

    async def refresh(self) -> None:
        """Do nothing: the certificate authorities belong to the TLS connection."""


@lru_cache(maxsize=1024)
def _read(pem: bytes) -> tuple[str, datetime]:
    """Return the SPIFFE id and the end of a certificate. Raises Refusal for one without exactly one id."""
    try:
        certificate = x509.load_pem_x509_certificate(pem)
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except (ValueError, x509.ExtensionNotFound, x509.DuplicateExtension, x509.UnsupportedGeneralNameType):
        raise credential_invalid("the client certificate has no SPIFFE id") from None
    ids = [uri for uri in names.get_values_for_type(x509.UniformResourceIdentifier) if uri.startswith(_SPIFFE)]
    if len(ids) != 1:
        raise credential_invalid(f"the client certificate must have one SPIFFE id, not {len(ids)}")
    return ids[0], certificate.not_valid_after_utc
