"""The operator's commands. They take the settings from the environment.

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
from encryption.key_wrapper import KeyWrapper
from encryption.keyring import Keyring
from encryption.settings import EncryptionSettings, key_wrapper


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
    if settings.key_store is None:
        sys.exit("ENCRYPTION_KEY_STORE has to be set")
    store, wrapper = KeyStore(settings.key_store), key_wrapper(settings)
    try:
        if arguments.command == "init":
            store.create()
            if isinstance(wrapper, Keyring) and settings.keyring is not None and not settings.keyring.exists():
                wrapper.turn()
            return
        store.check()
        if arguments.command == "turn":
            if not isinstance(wrapper, Keyring):
                sys.exit("KMS turns its keys itself")
            sys.stdout.write(f"current key-encryption key: {wrapper.turn()}\n")
        elif arguments.command == "rewrap":
            sys.stdout.write(f"data keys wrapped anew: {asyncio.run(_rewrap(store, wrapper))}\n")
        else:
            store.delete(checked_tenant(arguments.tenant))
    except (KeysUnavailable, ValueError, OSError) as error:
        sys.exit(str(error))


async def _rewrap(store: KeyStore, wrapper: KeyWrapper) -> int:
    keys = store.keys()
    for tenant, month in keys:
        stored = store.read(tenant, month)
        if stored is not None:
            key_id = KeyId(tenant, stored.name)
            secret = await wrapper.unwrap(stored.wrapped, str(key_id))
            store.replace(key_id, await wrapper.wrap(secret, str(key_id)))
    return len(keys)


if __name__ == "__main__":
    main()
