"""The network of hosts that tests make on one machine."""

import signal
import sys

import pytest

from tests.support.commands import run, start
from tests.support.network import NoNetwork, network

_HOLD = """
import asyncio
import signal
from tests.support.network import network

# What a shell starts in the background ignores it.
signal.signal(signal.SIGINT, signal.default_int_handler)

async def hold():
    async with network() as net:
        await net.host("server")
        print(net.name, flush=True)
        await asyncio.Event().wait()

asyncio.run(hold())
"""


async def namespaces() -> set[str]:
    listed = (await run("ip", "netns", "list")).output
    return {line.split()[0] for line in listed.splitlines()}


async def test_the_hosts_of_a_process_that_was_killed_are_removed_and_no_others() -> None:
    try:
        async with network():
            pass
    except NoNetwork as error:
        pytest.skip(str(error))
    killed, alive = [await start(sys.executable, "-c", _HOLD) for _ in range(2)]
    try:
        names = []
        for process in (killed, alive):
            assert process.stdout is not None
            names.append((await process.stdout.readline()).decode().strip())
        killed.kill()
        await killed.wait()
        left, kept = ({f"{name}-router", f"{name}-server"} for name in names)
        assert left | kept <= await namespaces()
        async with network():
            now = await namespaces()
        assert not left & now
        assert kept <= now
    finally:
        alive.send_signal(signal.SIGINT)
        await alive.communicate()
    assert not kept & await namespaces()
