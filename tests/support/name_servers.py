"""A name server on the loopback interface whose answers can change or be left out."""

import asyncio
import struct
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from ipaddress import ip_address
from typing import Any, Final

_HEADER: Final = struct.Struct("!6H")
_ANSWER: Final = 0x8180
"""Flags of a response with recursion desired and available."""
_NO_SUCH_NAME: Final = 3
_VERSIONS: Final = {1: 4, 28: 6}
"""IP version by query type: A and AAAA."""


class NameServer(asyncio.DatagramProtocol):
    """Server that returns the answers that say() sets, and NXDOMAIN for other names."""

    def __init__(self) -> None:
        self.asked = Counter[tuple[str, int]]()
        """Number of queries by name and IP version (4 or 6)."""
        self.address = ""
        """Host and port."""
        self._answers: dict[str, tuple[list[str], ...]] = {}
        self._transport: asyncio.DatagramTransport | None = None

    def say(self, name: str, *answers: list[str]) -> None:
        """Set a name's answers: each query gets the next one, and the last one repeats. Without any, none comes."""
        self._answers[name] = answers

    def connection_made(self, transport: Any) -> None:
        """Keep the transport; see asyncio.DatagramProtocol."""
        self._transport = transport
        self.address = "{}:{}".format(*transport.get_extra_info("sockname"))

    def datagram_received(self, data: bytes, address: tuple[str, int]) -> None:
        """Answer one query (RFC 1035, section 4) with a time to live of 0."""
        number, *_ = _HEADER.unpack_from(data)
        labels, at = [], _HEADER.size
        while length := data[at]:
            labels.append(data[at + 1 : at + 1 + length].decode().lower())
            at += 1 + length
        (kind,) = struct.unpack_from("!H", data, at + 1)
        name, question = ".".join(labels), data[_HEADER.size : at + 5]
        version = _VERSIONS[kind]
        turn = self.asked[name, version]
        self.asked[name, version] += 1
        answers = self._answers.get(name)
        if answers == ():
            return
        chosen = map(ip_address, answers[min(turn, len(answers) - 1)] if answers else ())
        records = [item.packed for item in chosen if item.version == version]
        flags = _ANSWER if answers else _ANSWER | _NO_SUCH_NAME
        answer = _HEADER.pack(number, flags, 1, len(records), 0, 0) + question
        for packed in records:
            answer += struct.pack("!HHHIH", 0xC00C, kind, 1, 0, len(packed)) + packed
        assert self._transport is not None
        self._transport.sendto(answer, address)


@asynccontextmanager
async def name_server() -> AsyncIterator[NameServer]:
    """Run a name server while the context is open."""
    server = NameServer()
    transport, _ = await asyncio.get_running_loop().create_datagram_endpoint(
        lambda: server, local_addr=("127.0.0.1", 0)
    )
    try:
        yield server
    finally:
        transport.close()
