"""Why something cannot be encrypted or decrypted, told apart by whether another attempt can help.

KeysUnavailable: a key cannot be had now. Its store is not mounted, its service away, its wrapping key missing.
Unreadable: a ciphertext was altered. It stays unreadable for ever. KeyDeleted: so does what a deleted key encrypted.
"""


class KeysUnavailable(RuntimeError):
    """A key cannot be had now. Whoever restores the store or the service makes the next attempt succeed."""


class Unreadable(ValueError):
    """A ciphertext that nobody can decrypt any more."""


class KeyDeleted(Unreadable):
    """The data key that a ciphertext names is not in the key store any more."""
