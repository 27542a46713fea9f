"""The operator's commands. They take the settings from the environment.

python -m encryption init                    create the key store and the keyring where there are none
python -m encryption turn                    add a key-encryption key, which wraps data keys from now on
python -m encryption rewrap                  wrap all data keys with the current key-encryption key
python -m encryption delete-tenant TENANT    delete a tenant's data keys; '' is the tenant without a name
python -m encryption lost KEY                record that a data key is lost for good, as /readyz names it
                     [--tenant TENANT]
python -m encryption hash ATTRIBUTE VALUE    show the hash of a search attribute's value, to search for it in Temporal
                     [--tenant TENANT]
"""

import argparse
import asyncio
import contextlib
import sys
from collections.abc import Iterator

from pydantic import ValidationError

from encryption.cipher import KeyId, checked_tenant
from encryption.data_keys import DataKeys
from encryption.errors import KeysUnavailable
from encryption.key_store import KeyStore, WrappedKey
from encryption.key_wrapper import KeyWrapper
from encryption.keyring import Keyring
from encryption.search_hash import SearchHash
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
    losing = commands.add_parser("lost")
    losing.add_argument("key")
    losing.add_argument("--tenant", default="")
    hashing = commands.add_parser("hash")
    hashing.add_argument("attribute")
    hashing.add_argument("value")
    hashing.add_argument("--tenant", default="")
    arguments = parser.parse_args()
    try:
        settings = EncryptionSettings()
    except ValidationError as error:
        sys.exit("\n".join(_problems(error)))
    if settings.key_store is None:
        sys.exit("ENCRYPTION_KEY_STORE has to be set")
    store, wrapper = KeyStore(settings.key_store), key_wrapper(settings)
    try:
        if arguments.command == "init":
            _init(store, wrapper, settings)
            return
        if arguments.command == "turn":
            if not isinstance(wrapper, Keyring):
                sys.exit("KMS rotates its keys itself")
            with contextlib.suppress(OSError):
                # The volume may be on another machine than the keyring.
                asyncio.run(DataKeys(store, wrapper).require_fit())
            sys.stdout.write(f"current key-encryption key: {wrapper.turn()}\n")
            return
        store.check()
        if arguments.command == "rewrap":
            sys.stdout.write(f"data keys wrapped by the current key: {asyncio.run(_rewrap(store, wrapper))}\n")
        elif arguments.command == "lost":
            key_id = KeyId.parse(arguments.tenant, arguments.key)
            store.give_up(key_id)
            sys.stdout.write(f"recorded as deleted: the data key {key_id}\n")
        elif arguments.command == "hash":
            keys, tenant = DataKeys(store, wrapper), checked_tenant(arguments.tenant)
            sys.stdout.write(f"{asyncio.run(_hash(keys, tenant, arguments.attribute, arguments.value))}\n")
        else:
            sys.stdout.write(f"data keys deleted: {store.delete(checked_tenant(arguments.tenant))}\n")
    except (KeysUnavailable, ValueError, OSError) as error:
        sys.exit(str(error))


def _problems(error: ValidationError) -> Iterator[str]:
    """Yield what is wrong with the settings. No line holds a value: it may be a secret."""
    for problem in error.errors(include_url=False, include_input=False, include_context=False):
        message = problem["msg"].removeprefix("Value error, ")
        yield f"ENCRYPTION_{str(problem['loc'][0]).upper()}: {message}" if problem["loc"] else message


def _init(store: KeyStore, wrapper: KeyWrapper, settings: EncryptionSettings) -> None:
    """Create the key store and the keyring where there are none.

    Raises KeysUnavailable for a keyring that cannot be used or is that of another store, and for a missing one whose
    keys the data keys need.
    """
    store.create()
    if isinstance(wrapper, Keyring) and settings.keyring is not None:
        if not settings.keyring.exists() and store.slots():
            raise KeysUnavailable(
                f"ENCRYPTION_KEYRING: {settings.keyring} is missing, and {settings.key_store} has data keys that a "
                "keyring has wrapped; bring that keyring back"
            )
        wrapper.create()
        asyncio.run(DataKeys(store, wrapper).require_fit())
        sys.stdout.write(f"keyring: {settings.keyring}\n")
    sys.stdout.write(f"key store: {settings.key_store}\n")


async def _rewrap(store: KeyStore, wrapper: KeyWrapper) -> int:
    count = 0
    for slot in store.slots():
        stored = store.read(slot)
        if stored is not None:
            context = str(KeyId(slot.tenant, stored.name))
            wrapped = await wrapper.wrap(await wrapper.unwrap(stored.wrapped, context), context)
            count += store.replace(slot, WrappedKey(name=stored.name, wrapped=wrapped))
    return count


async def _hash(keys: DataKeys, tenant: str, attribute: str, value: str) -> str:
    key = await keys.search_key(tenant, create=False)
    if key is None:
        raise KeysUnavailable(f"tenant {tenant!r} has no key of search attributes: none of its jobs has hashes")
    return SearchHash(key)(attribute, value)


if __name__ == "__main__":
    main()
