"""Encryption at rest: data keys of tenants, what wraps them, and the ciphers derived from them.

Each tenant has a data key for each month (`data_keys`). A key-encryption key wraps it, and it is stored in a folder
that all services share (`key_store`). The key-encryption key itself is in a file (`keyring`) or at a key-management
service (`kms`). Keys derived from the data key encrypt payloads and the records of the feed (`cipher`), so deleting a
tenant's wrapped keys makes everything that the tenant has stored unreadable.
"""

from encryption.data_keys import DataKeys
from encryption.errors import KeyDeleted, KeysUnavailable, NoKeyStore, Unreadable
from encryption.search_hash import SearchHash, is_hash
from encryption.settings import Encryption, EncryptionSettings, open_encryption

__all__ = [
    "DataKeys",
    "Encryption",
    "EncryptionSettings",
    "KeyDeleted",
    "KeysUnavailable",
    "NoKeyStore",
    "SearchHash",
    "Unreadable",
    "is_hash",
    "open_encryption",
]
