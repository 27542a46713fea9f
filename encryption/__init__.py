"""Encryption at rest: data keys of tenants, what wraps them, and the ciphers that come of them.

Each tenant has a data key a month (`data_keys`). It lies wrapped by a key-encryption key in a folder that all services
share (`key_store`); the key-encryption key itself is in a file (`keyring`) or at a key-management service (`kms`).
Payloads and records of the feed are encrypted by keys derived from it (`cipher`), so deleting a tenant's wrapped keys
makes all that it ever stored unreadable.
"""

from encryption.data_keys import DataKeys
from encryption.errors import KeyDeleted, KeysUnavailable, Unreadable
from encryption.settings import Encryption, EncryptionSettings, open_encryption

__all__ = [
    "DataKeys",
    "Encryption",
    "EncryptionSettings",
    "KeyDeleted",
    "KeysUnavailable",
    "Unreadable",
    "open_encryption",
]
