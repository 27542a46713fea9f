"""The operator's settings of the store."""

import re
from datetime import timedelta
from pathlib import Path
from typing import Final, Self
from urllib.parse import unquote, urlsplit

from pydantic import Field, SecretStr, field_validator, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

_ENDPOINT: Final = re.compile(r"https?://[^\s/@]+(/[^\s@]*)?")
_FORMS: Final = "the URL of a store has the form file:///path or s3://bucket/prefix"


class StoreSettings(BaseSettings):
    """The store of files, the same for every service."""

    model_config = SettingsConfigDict(
        env_prefix="STORE_", frozen=True, use_attribute_docstrings=True, hide_input_in_errors=True
    )

    url: str | None = None
    """Where files are stored: `file:///path`, a folder that all gateways and workers share, or `s3://bucket/prefix`.
    A service creates the folder, and none above it.
    Unset or empty: there are no files. A bucket needs a lifecycle rule that removes incomplete multipart
    uploads."""
    endpoint: str | None = None
    """URL of a server with the S3 API. Unset: AWS's own, in the region."""
    region: str = Field("us-east-1", min_length=1)
    """Region of the bucket."""
    access_key_id: SecretStr | None = None
    """Id of the access key for S3. Unset: the credentials that AWS's own tools would find, of the machine's role for
    example."""
    secret_access_key: SecretStr | None = None
    """Secret of STORE_ACCESS_KEY_ID."""
    secret_access_key_file: Path | None = None
    """File of that secret, instead of STORE_SECRET_ACCESS_KEY."""
    timeout: timedelta = Field(timedelta(seconds=20), gt=timedelta(0))
    """Maximum wait for the store's answer to one request, or for the next piece of an object, retries included."""

    @field_validator("url")
    @classmethod
    def _usable(cls, url: str | None) -> str | None:
        """Return the URL. Raises ValueError, without the URL in it, for one of another form."""
        if not url:
            return None
        try:
            parts = urlsplit(url)
            # A question mark or hash would be dropped silently, a user or password shown in logs.
            plain = not (parts.query or parts.fragment or "@" in parts.netloc)
        except ValueError as error:
            raise ValueError(_FORMS) from error
        is_file = parts.scheme == "file" and not parts.netloc and parts.path.strip("/")
        if not (plain and (is_file or (parts.scheme == "s3" and parts.netloc))):
            raise ValueError(_FORMS)
        return url

    @field_validator("endpoint")
    @classmethod
    def _holds_no_credentials(cls, url: str | None) -> str | None:
        if url is not None and _ENDPOINT.fullmatch(url) is None:
            raise ValueError("must be an http or https URL without user and password, such as https://s3.example:9000")
        return url

    @field_validator("secret_access_key_file")
    @classmethod
    def _can_be_read(cls, path: Path | None) -> Path | None:
        try:
            if path is not None:
                path.read_text()
        except OSError as error:
            raise ValueError(f"{path} cannot be read: {error.strerror}") from None
        return path

    @model_validator(mode="after")
    def _credentials_are_whole(self) -> Self:
        secrets = [value for value in (self.secret_access_key, self.secret_access_key_file) if value is not None]
        if len(secrets) != (self.access_key_id is not None):
            raise ValueError(
                "STORE_ACCESS_KEY_ID: set it and either STORE_SECRET_ACCESS_KEY or STORE_SECRET_ACCESS_KEY_FILE, or"
                " none of them"
            )
        return self

    @property
    def folder(self) -> Path | None:
        """The folder of a `file:` URL; None for another one."""
        if self.url is None or (parts := urlsplit(self.url)).scheme != "file":
            return None
        return Path(unquote(parts.path))

    @property
    def secret(self) -> SecretStr | None:
        """The secret of the access key. Raises OSError when its file cannot be read."""
        if self.secret_access_key_file is None:
            return self.secret_access_key
        return SecretStr(self.secret_access_key_file.read_text().strip())
