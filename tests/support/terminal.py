"""Programs that run on a terminal of their own."""

import asyncio
import contextlib
import os
import pty
import re
from types import TracebackType
from typing import Any, Self

from tests.support.paths import ROOT

CONTROLS = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


class Terminal:
    """A program whose standard input, output and error are one pseudo-terminal, as in a person's window."""

    def __init__(self, *command: str, **environment: str) -> None:
        self._command = command
        self._environment = environment
        self._read = bytearray()
        self._changed = asyncio.Event()
        self.process: Any = None

    async def __aenter__(self) -> Self:
        self._controller, terminal = pty.openpty()
        self.process = await asyncio.create_subprocess_exec(
            *self._command,
            cwd=ROOT,
            env={**os.environ, "TERM": "xterm", **self._environment},
            stdin=terminal,
            stdout=terminal,
            stderr=terminal,
            start_new_session=True,
        )
        os.close(terminal)
        asyncio.get_running_loop().add_reader(self._controller, self._take)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.process.returncode is None:
            self.process.kill()
            await self.process.wait()
        asyncio.get_running_loop().remove_reader(self._controller)
        os.close(self._controller)

    @property
    def raw(self) -> bytes:
        """What the terminal has got."""
        return bytes(self._read)

    @property
    def screen(self) -> str:
        """What the terminal has got, without its control sequences."""
        text = self._read.decode(errors="replace").replace("\r\n", "\n")
        return CONTROLS.sub("", text)

    def type(self, text: str) -> None:
        """Type text."""
        os.write(self._controller, text.encode())

    async def until(self, text: str) -> None:
        """Return once the screen holds the text."""
        async with asyncio.timeout(120):
            while text not in self.screen:
                assert self._open, self.screen
                await self._changed.wait()
                self._changed.clear()

    async def ended(self) -> int:
        """Return the exit status once the program has ended and all that it has written is read."""
        async with asyncio.timeout(120):
            status: int = await self.process.wait()
            while self._open:
                await self._changed.wait()
                self._changed.clear()
        return status

    _open = True

    def _take(self) -> None:
        data = b""
        # The kernel reports the end of a terminal without programs as EIO.
        with contextlib.suppress(OSError):
            data = os.read(self._controller, 65536)
        self._read += data
        if not data:
            self._open = False
            asyncio.get_running_loop().remove_reader(self._controller)
        self._changed.set()
