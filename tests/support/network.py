"""A network of hosts on one machine, whose links can be cut, lose packets, and be slow.

Each host is a network namespace of the kernel with a link to one router, which forwards between them. The process of
the tests has a link of its own. What happens to a link happens at the router, so that neither of its ends is told:
packets vanish without a reset and without an ICMP error, as on a cable that was pulled.

    async with network() as net:
        server = await net.host("server")
        await server.link.cut()

It needs Linux, root, iproute2 and nftables. The kernel of a small machine has no netem: `Delay` is a proxy.
"""

import asyncio
import itertools
import os
import random
import re
import shutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import Final

_TABLE: Final = "inet links"
_PER_MILLE: Final = 1000
_CLIENT: Final = 254
_FORBIDDEN: Final = ("not permitted", "denied", "Read-only", "not supported")
"""What the kernel says of a container that may have no namespaces."""
_NAMESPACE: Final = re.compile(r"n(\d+)-\d+-[a-z0-9]+")
"""The name of a namespace: the process that made it, the number of its network, and the host."""
_networks = itertools.count(1)


class NoNetwork(Exception):
    """This machine cannot make a network. The message says why."""


class Link:
    """The link between one host and the router."""

    def __init__(self, router: str, namespace: str, name: str, address: str) -> None:
        """`namespace` is the host's, empty for that of the tests' own process."""
        self._router = router
        self._namespace = namespace
        self._name = name
        self._address = address

    async def cut(self) -> None:
        """Drop every packet in both directions. Connections stay open at both ends."""
        await self._rule("drop")

    async def heal(self) -> None:
        """Forward all packets again, without a limit of the rate."""
        await self._rule("")
        with suppress(OSError):
            await _run("tc", "-n", self._router, "qdisc", "del", "dev", self._name, "root")

    async def drop(self, fraction: float) -> None:
        """Drop packets by chance, this fraction of them in each direction."""
        await self._rule(f"numgen random mod {_PER_MILLE} < {round(fraction * _PER_MILLE)} drop")

    async def limit(self, rate: str) -> None:
        """Limit the rate to the host, in the words of `tc`: "256kbit". The router's queue holds 400 ms of it."""
        shape = ("tbf", "rate", rate, "burst", "16kb", "latency", "400ms")
        await _run("tc", "-n", self._router, "qdisc", "replace", "dev", self._name, "root", *shape)

    async def strand(self) -> None:
        """Drop every packet of the connections that are open now. New connections pass.

        So it is when a machine between the two has forgotten them, or the other end was replaced.
        """
        # A socket of both versions of IP writes an address of version 4 in the form of version 6.
        listed = (
            (await _run("ss", "-Htn", "state", "established", namespace=self._namespace))
            .replace("[::ffff:", "")
            .replace("]", "")
        )
        rules = []
        for line in listed.splitlines():
            (own, own_port), (other, port) = (end.rsplit(":", 1) for end in line.split()[2:4])
            if own == self._address:
                for one, two, there, back in ((own, other, own_port, port), (other, own, port, own_port)):
                    rules.append(f"ip saddr {one} ip daddr {two} tcp sport {there} tcp dport {back} drop")
        await self._rule(*rules)

    async def _rule(self, *rules: str) -> None:
        lines = [f"flush chain {_TABLE} {self._name}", *(f"add rule {_TABLE} {self._name} {rule}" for rule in rules)]
        await _nft(self._router, *(line for line in lines if not line.endswith(" ")))


class Host:
    """A machine of the network: one namespace."""

    def __init__(self, network: str, name: str, address: str) -> None:
        self.name = name
        self.address = address
        self.link = Link(f"{network}-router", f"{network}-{name}", name, address)
        self._namespace = f"{network}-{name}"

    def command(self, *command: str) -> tuple[str, ...]:
        """Return the command that runs a program on this host, in a process of the same id."""
        return "ip", "netns", "exec", self._namespace, *command


class Network:
    """A router and the hosts that are linked to it, in a subnet that nothing else of this machine uses."""

    def __init__(self, name: str, subnet: str) -> None:
        self.name = name
        self._subnet = subnet
        self._router = f"{name}-router"
        self._numbers = itertools.count(1)
        self._namespaces: list[str] = []
        self.client: Final = Link(self._router, "", "client", f"{subnet}.{_CLIENT}")
        """The link of the tests' own process."""
        self.client_address: Final = f"{subnet}.{_CLIENT}"
        self.hosts: Final[dict[str, Host]] = {}

    async def open(self) -> None:
        """Create the router and the link of the tests' own process. Raises OSError."""
        await self._namespace(self._router)
        await _run("sh", "-c", "echo 1 > /proc/sys/net/ipv4/ip_forward", namespace=self._router)
        await _nft(
            self._router,
            f"add table {_TABLE}",
            f"add chain {_TABLE} forward {{ type filter hook forward priority 0; }}",
        )
        near = f"{self.name}c"
        await _run("ip", "link", "add", near, "type", "veth", "peer", "name", "client", "netns", self._router)
        await self._plug("client", self.client_address)
        await _run("ip", "address", "add", f"{self.client_address}/32", "dev", near)
        await _run("ip", "link", "set", near, "up")
        await _run("ip", "route", "add", f"{self._subnet}.0/24", "dev", near, "src", self.client_address)

    async def host(self, name: str) -> Host:
        """Add a host, with a name of at most 15 letters and digits."""
        host = Host(self.name, name, f"{self._subnet}.{next(self._numbers)}")
        namespace = f"{self.name}-{name}"
        await self._namespace(namespace)
        await _run(
            "ip", "-n", namespace, "link", "add", "eth0", "type", "veth", "peer", "name", name, "netns", self._router
        )
        await self._plug(name, host.address)
        await _run("ip", "-n", namespace, "address", "add", f"{host.address}/32", "dev", "eth0")
        await _run("ip", "-n", namespace, "link", "set", "eth0", "up")
        await _run("ip", "-n", namespace, "route", "add", f"{self._subnet}.0/24", "dev", "eth0", "src", host.address)
        self.hosts[name] = host
        return host

    async def close(self) -> None:
        """Remove all of it. Processes that still run on a host lose their links."""
        for namespace in reversed(self._namespaces):
            await _run("ip", "netns", "delete", namespace)

    async def _namespace(self, name: str) -> None:
        await _run("ip", "netns", "add", name)
        self._namespaces.append(name)
        await _run("ip", "-n", name, "link", "set", "lo", "up")

    async def _plug(self, name: str, address: str) -> None:
        """Join a link to the router, which answers on it for all other hosts."""
        await _run("ip", "-n", self._router, "link", "set", name, "up")
        proxy = (
            f"echo 1 > /proc/sys/net/ipv4/conf/{name}/proxy_arp; echo 0 > /proc/sys/net/ipv4/neigh/{name}/proxy_delay"
        )
        await _run("sh", "-c", proxy, namespace=self._router)
        await _run("ip", "-n", self._router, "route", "add", f"{address}/32", "dev", name)
        await _nft(
            self._router,
            f"add chain {_TABLE} {name}",
            f"add rule {_TABLE} forward iifname {name} jump {name}",
            f"add rule {_TABLE} forward oifname {name} jump {name}",
        )


@asynccontextmanager
async def network() -> AsyncIterator[Network]:
    """Make a network while the context is open. Raises NoNetwork where this machine cannot.

    The networks of processes that were killed are removed first.
    """
    if (reason := _obstacle()) is not None:
        raise NoNetwork(reason)
    await _sweep()
    # From the block that is reserved for tests of networks.
    made = Network(f"n{os.getpid()}-{next(_networks)}", f"198.18.{random.randrange(256)}")
    try:
        await made.open()
    except OSError as error:
        await made.close()
        if any(word in str(error) for word in _FORBIDDEN):
            raise NoNetwork(f"network namespaces are not allowed here: {error}") from error
        raise
    try:
        yield made
    finally:
        await made.close()


class Delay:
    """A TCP proxy that delivers every byte later, and in order, in both directions."""

    def __init__(self, target: str, seconds: float) -> None:
        self._target = target
        self._seconds = seconds
        self._server: asyncio.Server | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    async def start(self, host: str) -> str:
        """Listen on a free port of the host, and return the address."""
        self._server = await asyncio.start_server(self._serve, host, 0)
        return f"{host}:{self._server.sockets[0].getsockname()[1]}"

    async def close(self) -> None:
        """End the proxy and its connections."""
        assert self._server is not None
        self._server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            far_reader, far_writer = await asyncio.open_connection(*self._target.rsplit(":", 1))
        except OSError:
            writer.close()
            return
        for source, sink in ((reader, far_writer), (far_reader, writer)):
            task = asyncio.create_task(self._pass_on(source, sink))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _pass_on(self, source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
        loop = asyncio.get_running_loop()
        coming: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue()

        async def receive() -> None:
            data = b"first"
            while data:
                with suppress(OSError):
                    data = b""
                    data = await source.read(65536)
                coming.put_nowait((loop.time() + self._seconds, data))

        receiving = asyncio.create_task(receive())
        try:
            while True:
                due, data = await coming.get()
                await asyncio.sleep(due - loop.time())
                if not data:
                    break
                sink.write(data)
                await sink.drain()
        except OSError:
            pass
        finally:
            receiving.cancel()
            sink.close()


def _obstacle() -> str | None:
    """Return why this machine cannot make a network, as far as it shows without a try."""
    if not hasattr(os, "geteuid") or os.geteuid() != 0:
        return "network namespaces need root"
    for program, package in (("ip", "iproute2"), ("tc", "iproute2"), ("ss", "iproute2"), ("nft", "nftables")):
        if shutil.which(program) is None:
            return f"{program} is not installed, Debian's package {package}"
    return None


async def _sweep() -> None:
    """Remove the namespaces of processes that are gone. Another process may do so at the same time."""
    for line in (await _run("ip", "netns", "list")).splitlines():
        name = line.split()[0]
        if _is_left(name):
            with suppress(OSError):
                await _run("ip", "netns", "delete", name)


def _is_left(namespace: str) -> bool:
    """Return whether the namespace is a network's whose process is gone."""
    matched = _NAMESPACE.fullmatch(namespace)
    return matched is not None and not os.path.exists(f"/proc/{matched[1]}")


async def _nft(namespace: str, *lines: str) -> None:
    await _run("nft", "\n".join(lines), namespace=namespace)


async def _run(*command: str, namespace: str = "") -> str:
    """Run a command, in a namespace if one is given, and return what it prints. Raises OSError with its complaint."""
    prefix = ("ip", "netns", "exec", namespace) if namespace else ()
    process = await asyncio.create_subprocess_exec(
        *prefix, *command, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
    )
    output, problem = await process.communicate()
    if process.returncode != 0:
        raise OSError(f"{' '.join(command)}: {problem.decode().strip()}")
    return output.decode()
