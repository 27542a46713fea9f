"""The settings of signing in, which the settings of the front inherit."""

from datetime import timedelta
from pathlib import Path
from typing import Any, Literal, Self
from urllib.parse import urlsplit

from pydantic import Field, field_validator, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from runtime.addresses import is_confidential
from runtime.files import ReadableFile
from runtime.tls import ClientTls, client_context
from services.http.signin.keys import read_keys


class SignInSettings(BaseSettings):
    """How people sign in to the console."""

    model_config = SettingsConfigDict(frozen=True, use_attribute_docstrings=True, hide_input_in_errors=True)

    public_url: str = ""
    """The URL by which browsers reach the front, without a path: https://llm.example. With https the cookies are
    Secure, also where a proxy ends TLS. HTTP_OIDC_ISSUER needs it."""
    session_key_file: ReadableFile | None = None
    """File of the keys that encrypt the sessions of the console, the same at every front: 32 random bytes in base64 a
    line. The first key encrypts, all decrypt. A changed file is read within a few seconds. Unset: the
    process generates a key, so its sessions end with it; that is for a front on loopback alone."""
    session_lifetime: timedelta = Field(timedelta(hours=12), gt=timedelta(0))
    """Time after which a person has to sign in again."""
    session_idle: timedelta = Field(timedelta(hours=1), gt=timedelta(0))
    """Time without an opened page or a sent form after which a person has to sign in again, within a tenth of it."""
    oidc_issuer: str = ""
    """The OpenID provider with which people may sign in: its issuer, a URL with https or on loopback. Set
    HTTP_OIDC_CLIENT_ID and HTTP_PUBLIC_URL, too. Unset: people sign in with an API key or a token."""
    oidc_client_id: str = ""
    """The id of the console at the OpenID provider."""
    oidc_client_secret_file: ReadableFile | None = None
    """File of the secret of the console at the OpenID provider. Unset: it is a public client."""
    oidc_scopes: str = "openid"
    """The scopes to request, with spaces between them. `openid` must be one of them. `offline_access` brings a refresh
    token at many providers, with which a session outlives its token."""
    oidc_token: Literal["id", "access"] = "access"  # noqa: S105  # which kind it is
    """Which token of the provider is sent to the gateway, whose GATEWAY_JWT_… settings have to accept it."""
    oidc_tls_ca: ReadableFile | None = None
    """PEM file of the CAs that may have issued the provider's certificate. Unset: the system's."""

    @property
    def oidc_tls(self) -> ClientTls | None:
        """The files of the connection to the OpenID provider. None: the CAs of the system."""
        return ClientTls("HTTP_OIDC_TLS_", self.oidc_tls_ca) if self.oidc_tls_ca is not None else None

    @field_validator("session_key_file")
    @classmethod
    def _keys_can_be_used(cls, path: Path | None) -> Path | None:
        if path is not None:
            read_keys(path)
        return path

    @field_validator("oidc_client_secret_file")
    @classmethod
    def _secret_can_be_used(cls, path: Path | None) -> Path | None:
        if path is not None:
            read_secret(path)
        return path

    @field_validator("public_url", "oidc_issuer")
    @classmethod
    def _urls_are_safe(cls, value: str, info: Any) -> str:
        if not value:
            return value
        url = urlsplit(value)
        if not url.hostname or not is_confidential(value):
            raise ValueError("must be an https URL, or an http URL on loopback")
        if info.field_name == "public_url":
            if url.path not in ("", "/") or url.query or url.fragment or url.username is not None:
                raise ValueError("must be scheme://host[:port], without a path")
            return value.rstrip("/")
        return value

    @field_validator("oidc_scopes")
    @classmethod
    def _scopes_ask_for_oidc(cls, value: str) -> str:
        if "openid" not in value.split():
            raise ValueError("must hold the scope openid")
        return value

    @model_validator(mode="after")
    def _oidc_is_whole(self) -> Self:
        needed = {"HTTP_OIDC_CLIENT_ID": self.oidc_client_id, "HTTP_PUBLIC_URL": self.public_url}
        if self.oidc_issuer and not all(needed.values()):
            unset = [name for name, value in needed.items() if not value]
            raise ValueError(f"HTTP_OIDC_ISSUER needs {' and '.join(unset)}, too")
        if self.oidc_tls is not None:
            try:
                client_context(self.oidc_tls)
            except OSError as error:
                # pydantic reports a ValueError as an invalid setting.
                raise ValueError(str(error)) from error
        return self


def read_secret(path: Path) -> str:
    """Return the secret of a client in a file. Raises ValueError: without a secret the client would be a public one."""
    try:
        secret = path.read_text().strip()
    except (OSError, UnicodeDecodeError) as error:
        words = error.strerror if isinstance(error, OSError) else "it is no UTF-8"
        raise ValueError(f"{path} cannot be read: {words}") from None
    if not secret:
        raise ValueError(f"{path} holds no secret; a public client has no such file")
    return secret
