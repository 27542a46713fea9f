"""`python -m services.gateway.batches.work FD`: does the steps of batches, each in a process of its own.

Lines are parsed, checked and written here, which takes a processor's whole time for seconds or minutes: the gateway
serves calls meanwhile. The program has the gateway's environment, and thus its settings.

Its imports take as long as thousands of lines. So it loads all modules once, and forks for each connection that the
gateway sends to the socket FD. The new process reads a line with the step and the size of its task, then the task. It
answers with a line of a status and a size, then the result or the reason why there is none. It ends when the gateway
closes the connection. The program itself has one thread, so that a fork finds no lock taken.
"""

import asyncio
import gc
import os
import socket
import sys
import threading
import traceback
from signal import SIG_IGN, SIGCHLD, SIGINT, signal
from typing import BinaryIO, Final

from batches.results import LostItem
from batches.segments import DamagedSegment
from encryption import KeysUnavailable, Unreadable, open_encryption
from jobs.ids import tenant_of
from llm_pb import internal_pb2
from services.gateway.batches.merging import IncompleteBatch, merge
from services.gateway.batches.planning import plan
from services.gateway.settings import GatewaySettings
from store.encrypted import open_store
from store.settings import StoreSettings
from store.store import ObjectMissing, StoreUnavailable

PLAN: Final = "plan"
MERGE: Final = "merge"
DONE: Final = 0
"""Status: the result follows."""
FAILED: Final = 1
"""Status: the step has failed for another reason than the following."""
LATER: Final = 75
"""Status: the store or a key is away; try again."""
GONE: Final = 65
"""Status: content is gone, or can never be decrypted again."""
DAMAGED: Final = 70
"""Status: the results do not fit the lines."""
_IDLE_SECONDS: Final = 600
"""Time without a step after which the program ends, and its memory is free again."""


async def run(step: str, task: bytes) -> bytes:
    """Do the step, and return its result. Raises the errors of the store."""
    encryption = open_encryption(tenant_of)
    store = open_store(StoreSettings(), encryption)
    if store is None:
        raise StoreUnavailable("STORE_URL is not set")
    if step == MERGE:
        merging = internal_pb2.MergeTask.FromString(task)
        return (await merge(merging, store.of_tenant(merging.request.tenant))).SerializeToString()
    planning = internal_pb2.PlanTask.FromString(task)
    found = await plan(planning, store.of_tenant(planning.request.tenant), GatewaySettings(), encryption)
    return found.SerializeToString()


def attempt(step: str, task: bytes) -> tuple[int, bytes]:
    """Do the step; return the status, and the result or the reason why there is none."""
    try:
        return DONE, asyncio.run(run(step, task))
    except (StoreUnavailable, KeysUnavailable) as error:
        status, words = LATER, str(error)
    except (ObjectMissing, Unreadable) as error:
        status, words = GONE, str(error)
    except (IncompleteBatch, DamagedSegment, LostItem) as error:
        status, words = DAMAGED, str(error)
    except Exception:  # noqa: BLE001  # the gateway logs it
        status, words = FAILED, traceback.format_exc()
    return status, words.encode(errors="replace")


def _serve(connection: socket.socket) -> None:
    """Do the step that a connection asks for, and answer there."""
    asked = connection.makefile("rb")
    step, size = asked.readline().split()
    task = asked.read(int(size))
    threading.Thread(target=_end_with, args=[asked], daemon=True).start()
    status, rest = attempt(step.decode(), task)
    connection.sendall(b"%d %d\n" % (status, len(rest)) + rest)


def _end_with(connection: BinaryIO) -> None:
    """End the process when the gateway closes the connection: the step was cancelled, or the gateway has ended."""
    connection.read(1)
    os._exit(0)


def main() -> None:
    """Fork for each connection, until the gateway ends or needs no process for a long time."""
    channel = socket.socket(fileno=int(sys.argv[1]))
    channel.settimeout(_IDLE_SECONDS)
    # Nobody waits for the processes, and Ctrl-C is for the gateway.
    signal(SIGCHLD, SIG_IGN)
    signal(SIGINT, SIG_IGN)
    # A collection would write to all pages that the processes share.
    gc.collect()
    gc.freeze()
    while True:
        try:
            message, descriptors, *_ = socket.recv_fds(channel, 1, 1)
        except TimeoutError:
            return
        if not message:
            return
        with socket.socket(fileno=descriptors[0]) as connection:
            if not os.fork():
                try:
                    # Only this program's end of it may keep it open.
                    channel.close()
                    _serve(connection)
                finally:
                    os._exit(0)


if __name__ == "__main__":
    main()
