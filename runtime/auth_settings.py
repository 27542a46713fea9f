"""The settings of authentication, which the settings of a service inherit, and their Authenticators."""

import re
from datetime import timedelta
from typing import Self

from pydantic import Field, field_validator, model_validator
from pydantic_settings import SettingsConfigDict

from runtime.addresses import is_confidential, is_loopback
from runtime.auth import Authenticator
from runtime.auth_certificates import PROXY, CertificateRule, ClientCertificates
from runtime.auth_jwt import ANY_USER, Algorithm, JwtRules, Jwts
from runtime.auth_keys import ApiKeys, KeysFile
from runtime.health import Readiness
from runtime.jwt_keys import KeySet, KeySetError, read_key_set
from runtime.scopes import SCOPES
from runtime.tls import ServerTlsSettings


class AuthSettings(ServerTlsSettings):
    """Who may call a service."""

    model_config = SettingsConfigDict(frozen=True, use_attribute_docstrings=True, hide_input_in_errors=True)

    host: str = "127.0.0.1"
    """Address to listen on; loopback unless set."""
    allow_anonymous: bool = False
    """Whether the service may listen elsewhere than on loopback without authentication, because a proxy in front of it
    authenticates the callers. Otherwise it does not start there. Ignored where authentication is configured."""
    api_keys_file: KeysFile | None = None
    """The file of the API keys that may call, which `python -m services.gateway.keys` writes. It is read again whenever
    it has changed. Unset: no API keys."""
    jwt_issuer: str = ""
    """The issuer (`iss`) whose JSON Web Tokens may call; set …_JWT_AUDIENCE and …_JWT_KEYS, too. Unset: no tokens."""
    jwt_audience: str = ""
    """The audience (`aud`) that a token must name: this installation."""
    jwt_keys: str = ""
    """Where the issuer's public keys are: the URL of its JSON Web Key Set, https or on loopback, or a file's path."""
    jwt_algorithms: tuple[Algorithm, ...] = Field(("RS256", "ES256"), min_length=1)
    """The algorithms that a token may be signed with, as JSON: RS, PS or ES with 256, 384 or 512, EdDSA."""
    jwt_leeway: timedelta = Field(timedelta(minutes=1), ge=timedelta(0), le=timedelta(minutes=5))
    """Maximum difference between the clocks of issuer and service. A token is accepted for this much longer. PT0S: for
    no longer."""
    jwt_scopes_claim: str = Field("scope", min_length=1)
    """The claim with the caller's scopes: a text with spaces between them, or a list."""
    jwt_tenant_claim: str = ""
    """The claim with the caller's tenant. A token without it is refused. Unset: the callers have no tenant."""
    jwt_user_claim: str = ""
    """The claim with the one user whose jobs the caller may submit and read. Unset: those of all users of the
    tenant."""
    client_certificates: tuple[CertificateRule, ...] = ()
    """What client certificates may call, by their SPIFFE ids, as JSON: pattern, a regular expression for the whole id,
    and scopes. A group `tenant` in the pattern, or else the field tenant, names the tenant. The first rule that matches
    applies. The scope `proxy` is for proxies that send their callers' credentials. Needs …_TLS_CLIENT_CA."""

    @property
    def listens(self) -> bool:
        """Whether the process listens for calls."""
        return True

    @field_validator("jwt_keys")
    @classmethod
    def _keys_come_safely(cls, source: str) -> str:
        if "://" in source and not is_confidential(source):
            raise ValueError("must be an https URL, an http URL on loopback or a path")
        if source and "://" not in source:
            # Unlike an issuer, a file that is away at the start does not come back by itself.
            try:
                read_key_set(source)
            except KeySetError as error:
                raise ValueError(str(error)) from None
        return source

    @field_validator("client_certificates")
    @classmethod
    def _scopes_exist(cls, rules: tuple[CertificateRule, ...]) -> tuple[CertificateRule, ...]:
        if unknown := sorted(frozenset().union(*(rule.scopes for rule in rules)) - SCOPES - {PROXY}):
            raise ValueError(f"there is no scope {', '.join(unknown)}")
        return rules

    @model_validator(mode="after")
    def _callers_are_known(self) -> Self:
        prefix = self.model_config.get("env_prefix", "")
        of_tokens = {"ISSUER": self.jwt_issuer, "AUDIENCE": self.jwt_audience, "KEYS": self.jwt_keys}
        if any(of_tokens.values()) and not all(of_tokens.values()):
            unset = [f"{prefix}JWT_{name}" for name, value in of_tokens.items() if not value]
            needed = ", ".join(f"{prefix}JWT_{name}" for name in of_tokens)
            raise ValueError(f"tokens need all of {needed}: set {' and '.join(unset)}, too")
        authenticated = self.api_keys_file is not None or self.jwt_issuer or self.client_certificates
        if not self.listens or authenticated or self.allow_anonymous or is_loopback(self.host):
            return self
        raise ValueError(
            f"{prefix}HOST {self.host} is not loopback, so callers have to be authenticated. Set one of "
            f"{prefix}API_KEYS_FILE, {prefix}JWT_ISSUER and {prefix}CLIENT_CERTIFICATES; or, behind a proxy that "
            f"authenticates them, {prefix}ALLOW_ANONYMOUS=true"
        )

    @model_validator(mode="after")
    def _certificates_are_asked_for(self) -> Self:
        prefix = self.model_config.get("env_prefix", "")
        if self.client_certificates and self.tls_client_ca is None:
            raise ValueError(f"{prefix}CLIENT_CERTIFICATES needs {prefix}TLS_CLIENT_CA: no client would present any")
        return self


async def open_authenticators(
    settings: AuthSettings, readiness: Readiness, user_form: re.Pattern[str] = ANY_USER
) -> list[Authenticator]:
    """Return an Authenticator for each kind of credential in the settings.

    Each was refreshed once. `user_form` is the form of a JWT's user claim. Keys that become unusable are
    reported as degraded. Raises KeyFileError.
    """
    authenticators: list[Authenticator] = []
    if settings.api_keys_file is not None:
        keys = ApiKeys(settings.api_keys_file, SCOPES)
        authenticators.append(keys)
        keys.want_usable(readiness, "api keys")
    if settings.jwt_issuer:
        rules = JwtRules(
            issuer=settings.jwt_issuer,
            audience=settings.jwt_audience,
            algorithms=settings.jwt_algorithms,
            leeway=settings.jwt_leeway,
            scopes_claim=settings.jwt_scopes_claim,
            tenant_claim=settings.jwt_tenant_claim,
            user_claim=settings.jwt_user_claim,
            user_form=user_form,
        )
        key_set = KeySet(settings.jwt_keys)
        authenticators.append(Jwts(rules, key_set, SCOPES))
        readiness.want("jwt keys", "cannot be read: those that were read last count", lambda: key_set.usable)
    if settings.client_certificates:
        authenticators.append(ClientCertificates(settings.client_certificates))
    for authenticator in authenticators:
        await authenticator.refresh()
    return authenticators
