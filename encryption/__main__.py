"""The operator's commands. They take ENCRYPTION_KEY_STORE and ENCRYPTION_KEYRING from the environment.

python -m encryption init                   make the key store and the keyring where there are none
python -m encryption turn                   add a key-encryption key, which wraps data keys from now on
python -m encryption rewrap                 wrap all data keys by the current key-encryption key
python -m encryption delete-tenant TENANT   delete a tenant's data keys; '' is the tenant without a name
"""

import argparse
import asyncio
import sys

from encryption.cipher import KeyId, checked_tenant
from encryption.errors import KeysUnavailable
from encryption.key_store import KeyStore
from encryption.keyring import Keyring
from encryption.settings import EncryptionSettings


def main() -> None:
    """Run the command that the arguments name. Exits with a message when the settings or the files do not allow it."""
    parser = argparse.ArgumentParser(
        "python -m encryption", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    for name in ("init", "turn", "rewrap"):
        commands.add_parser(name)
    commands.add_parser("delete-tenant").add_argument("tenant")
    arguments = parser.parse_args()
    settings = EncryptionSettings()
    if settings.key_store is None or settings.keyring is None:
        sys.exit("ENCRYPTION_KEY_STORE and ENCRYPTION_KEYRING have to be set")
    store, keyring = KeyStore(settings.key_store), Keyring(settings.keyring)
    try:
        if arguments.command == "init":
            store.create()
            if not settings.keyring.exists():
                keyring.turn()
            return
        store.check()
        if arguments.command == "turn":
            sys.stdout.write(f"current key-encryption key: {keyring.turn()}\n")
        elif arguments.command == "rewrap":
            sys.stdout.write(f"data keys wrapped anew: {asyncio.run(_rewrap(store, keyring))}\n")
        else:
            store.delete(checked_tenant(arguments.tenant))
    except (KeysUnavailable, ValueError, OSError) as error:
        sys.exit(str(error))


async def _rewrap(store: KeyStore, keyring: Keyring) -> int:
    keys = store.keys()
    for tenant, month in keys:
        stored = store.read(tenant, month)
        if stored is not None:
            key_id = KeyId(tenant, stored.name)
            secret = await keyring.unwrap(stored.wrapped, str(key_id))
            store.replace(key_id, await keyring.wrap(secret, str(key_id)))
    return len(keys)


if __name__ == "__main__":
    main()
