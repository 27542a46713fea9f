"""`python -m services.gateway.batches.work plan` or `merge`: a step of a batch in a process of its own.

Lines are parsed, checked and written here, which takes a processor's whole time for seconds or minutes: the gateway
serves calls meanwhile. The process has the gateway's environment, and thus its settings. It reads its task from its
standard input, writes the result to its standard output, and tells by its exit status what it could not do.
"""

import asyncio
import sys
from typing import Final

from batches.results import LostItem
from batches.segments import DamagedSegment
from encryption import KeysUnavailable, Unreadable, open_encryption
from jobs.ids import tenant_of
from llm_pb import internal_pb2
from services.gateway.batches.merging import IncompleteBatch, merge
from store.encrypted import open_store
from store.settings import StoreSettings
from store.store import ObjectMissing, StoreUnavailable

PLAN: Final = "plan"
MERGE: Final = "merge"
LATER: Final = 75
"""Exit status: the store or a key is away; try again."""
GONE: Final = 65
"""Exit status: content is gone, or can never be decrypted again."""
DAMAGED: Final = 70
"""Exit status: the results do not fit the lines."""


async def run(step: str, task: bytes) -> bytes:
    """Do the step, and return its result. Raises the errors of the store."""
    encryption = open_encryption(tenant_of)
    store = open_store(StoreSettings(), encryption)
    if store is None:
        raise StoreUnavailable("STORE_URL is not set")
    if step == MERGE:
        merging = internal_pb2.MergeTask.FromString(task)
        return (await merge(merging, store.of_tenant(merging.request.tenant))).SerializeToString()
    # A merge needs no settings of the gateway, and their imports take more than half of its process's start.
    from services.gateway.batches.planning import plan
    from services.gateway.settings import GatewaySettings

    planning = internal_pb2.PlanTask.FromString(task)
    found = await plan(planning, store.of_tenant(planning.request.tenant), GatewaySettings(), encryption)
    return found.SerializeToString()


def main() -> int:
    """Return the exit status."""
    try:
        result = asyncio.run(run(sys.argv[1], sys.stdin.buffer.read()))
    except (StoreUnavailable, KeysUnavailable) as error:
        sys.stderr.write(str(error))
        return LATER
    except (ObjectMissing, Unreadable) as error:
        sys.stderr.write(str(error))
        return GONE
    except (IncompleteBatch, DamagedSegment, LostItem) as error:
        sys.stderr.write(str(error))
        return DAMAGED
    sys.stdout.buffer.write(result)
    return 0


if __name__ == "__main__":
    sys.exit(main())
