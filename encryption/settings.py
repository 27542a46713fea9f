"""What an operator can set about encryption at rest, and what it comes to."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from pydantic import Field, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from encryption.data_keys import DataKeys
from encryption.key_store import KeyStore
from encryption.key_wrapper import KeyWrapper
from encryption.keyring import Keyring


class EncryptionSettings(BaseSettings):
    """Encryption at rest, the same for every service."""

    model_config = SettingsConfigDict(env_prefix="ENCRYPTION_", frozen=True, use_attribute_docstrings=True)

    key_store: Path | None = None
    """Folder of the wrapped data keys, on a volume that all services share. Unset: nothing is encrypted, and what was
    encrypted cannot be read."""
    keyring: Path | None = None
    """File of the key-encryption keys. `python -m encryption init` makes it, and the folder, where there is none."""
    kms_key: str | None = Field(None, pattern=r"^arn:[^:]+:kms:[a-z0-9-]+:[0-9]*:.+$")
    """ARN of a key of AWS KMS, which wraps data keys in place of a keyring."""
    kms_url: str | None = None
    """URL of another service that speaks the API of KMS. Unset: that of the key's region."""
    write: bool = True
    """Whether what is written is encrypted. `false`: this process only decrypts, until all services have the keys."""

    @model_validator(mode="after")
    def _complete(self) -> Self:
        wrappers = [value for value in (self.keyring, self.kms_key) if value is not None]
        if len(wrappers) != (self.key_store is not None):
            raise ValueError(
                "ENCRYPTION_KEY_STORE: set it and either ENCRYPTION_KEYRING or ENCRYPTION_KMS_KEY, or none of them"
            )
        return self


def _no_tenant(_workflow_id: str) -> str:
    return ""


@dataclass(frozen=True)
class Encryption:
    """How this process encrypts."""

    keys: DataKeys
    write: bool = True
    """Whether it encrypts; it decrypts in any case."""
    tenant_of: Callable[[str], str] = _no_tenant
    """Returns the tenant to whom a workflow belongs, by its id; empty without tenants."""


def open_encryption(
    tenant_of: Callable[[str], str] = _no_tenant, settings: EncryptionSettings | None = None
) -> Encryption | None:
    """Return how this process encrypts, by default by the settings of the environment; None when it does not.

    Raises KeysUnavailable when the folder is no key store.
    """
    settings = settings or EncryptionSettings()
    if settings.key_store is None:
        return None
    store = KeyStore(settings.key_store)
    store.check()
    return Encryption(DataKeys(store, key_wrapper(settings)), settings.write, tenant_of)


def key_wrapper(settings: EncryptionSettings) -> KeyWrapper:
    """Return what wraps data keys. Raises ImportError for KMS without the extra `kms`."""
    if settings.keyring is not None:
        return Keyring(settings.keyring)
    # Only who uses it needs its library.
    from encryption.kms import Kms

    return Kms(settings.kms_key or "", settings.kms_url)
