"""Why something cannot be encrypted or decrypted, and whether another attempt can help.

KeysUnavailable: a key is unavailable now. Its store is not mounted, its service is down, its wrapping key is missing.
NoKeyStore: the folder of the settings holds no key store, or cannot be read. DamagedKey: a file of it holds no key.
Unreadable: a ciphertext was altered, and stays unreadable. KeyDeleted: so does the content of a deleted key.
"""


class KeysUnavailable(RuntimeError):
    """A key is unavailable now. Another attempt succeeds once the store or the service is back."""


class NoKeyStore(KeysUnavailable):
    """The folder is no key store now, or cannot be read. The message begins with the setting's name."""


class DamagedKey(KeysUnavailable):
    """A file of the key store holds no key. The message names it."""


class Unreadable(ValueError):
    """A ciphertext that can never be decrypted again."""


class KeyDeleted(Unreadable):
    """The data key of a ciphertext was deleted with its tenant's keys."""
