"""Standard output: the text of a job, or lines. Nothing stays in a buffer."""

import errno
import io
import os
import select
import stat
import sys
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, Final

from durable_llm.cli._exits import CommandError, Exit, ReaderGone
from durable_llm.cli._text import say, visible

if TYPE_CHECKING:
    from google.protobuf.message import Message

    from llm_pb.llm_pb2 import OutputDelta

STDOUT: Final = 1
_FOLDING_WIDTH: Final = 80
"""Number of columns from which on a table folds what does not fit."""


def write(text: str) -> None:
    """Write text in UTF-8, whatever the locale: scripts get the bytes of the job. Raises ReaderGone."""
    write_bytes(memoryview(text.encode()))


def write_bytes(data: bytes | memoryview) -> None:
    """Write bytes as they are. Raises ReaderGone."""
    data = memoryview(data)
    while data:
        try:
            data = data[os.write(STDOUT, data) :]
        except BlockingIOError:
            select.select([], [STDOUT], [])
        except OSError as error:
            if error.errno in (errno.EPIPE, errno.EBADF):
                raise ReaderGone from None
            raise


class _Bytes(io.RawIOBase):
    """The bytes of standard output."""

    def write(self, data: Any) -> int:
        """Write bytes. Raises ReaderGone."""
        write_bytes(memoryview(data))
        return len(data)


class StandardOutput(io.TextIOBase):
    """Standard output for what others print, such as click its help: it goes where write() writes, in the same way."""

    encoding = "utf-8"

    def __init__(self) -> None:
        self.buffer = _Bytes()
        """Where bytes are written, such as click's completions."""

    def write(self, text: str) -> int:
        """Write text. Raises ReaderGone."""
        write(text)
        return len(text)

    def fileno(self) -> int:
        """Return the descriptor, by which a terminal is known."""
        return STDOUT

    def isatty(self) -> bool:
        """Return whether it is a terminal."""
        return on_terminal()


def hold_descriptors() -> None:
    """Hold the places of closed standard streams, so that no connection gets the number of one.

    A write to closed standard output then fails, as it does without.
    """
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            # The lowest free number is taken: this one.
            os.open(os.devnull, os.O_WRONLY if name == "stderr" else os.O_RDONLY)
            if name != "stdout":
                setattr(sys, name, open(number, "r" if name == "stdin" else "w", closefd=False))  # noqa: SIM115


def write_line(text: str) -> None:
    """Write a line. On a terminal it cannot hold what controls one."""
    write(f"{visible(text) if on_terminal() else text}\n")


def write_json(message: "Message | dict[str, Any]") -> None:
    """Write a message as protobuf's JSON, or a dict, on one line."""
    import json

    from google.protobuf import json_format

    fields = message if isinstance(message, dict) else json_format.MessageToDict(message)
    write(json.dumps(fields, ensure_ascii=False) + "\n")


def write_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Write rows: on a terminal as a table with a header, otherwise as fields separated by tabs, for scripts.

    A narrow window in which the table does not fit gets the first field of a row on a line of its own, whole, and the
    others below it.
    """
    if not on_terminal():
        for row in rows:
            write_line("\t".join(row))
        return
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    shown = [[visible(cell) for cell in row] for row in rows]
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in header:
        table.add_column(name, overflow="fold")
    for row in shown:
        table.add_row(*map(Text, row))
    console = Console(file=sys.stdout, highlight=False)
    # By itself the console measures no more than its width.
    needed = console.measure(table, options=console.options.update(max_width=sys.maxsize)).maximum
    with console.capture() as captured:
        if console.width >= _FOLDING_WIDTH or needed <= console.width:
            console.print(table)
        else:
            console.print(Text(_stacked(header), style="bold"), soft_wrap=True)
            for row in shown:
                console.print(Text(_stacked(row)), soft_wrap=True)
    write(captured.get())


def _stacked(row: Sequence[str]) -> str:
    """Return the lines of a row: its first field, and below it the others that are not empty."""
    first, *others = row
    return f"{first}\n  " + "  ".join(filter(None, others))


def on_terminal() -> bool:
    """Return whether standard output is a terminal."""
    return os.isatty(STDOUT)


class JobText:
    """The text of a job on standard output: what is there in the end is the job's output, byte for byte.

    A rewind takes output back. A file is cut and written again from there. A terminal shows a note, then the new text.
    From a pipe nothing can be taken back, so the command ends with Exit.REWOUND.
    """

    def __init__(self) -> None:
        self._begin: int | None = None
        """Offset in the output of the first byte that was written here."""
        self._end = 0
        self._file_place = _place_in_file()
        self._last = "\n"
        self._return = ""
        """A carriage return that the terminal has not got: a line feed may follow it."""

    def add(self, delta: "OutputDelta") -> None:
        """Write a piece. Raises CommandError for a rewind of what cannot be taken back."""
        if delta.rewind:
            self._take_back(delta.offset)
        if self._begin is None:
            self._begin = delta.offset
        if on_terminal():
            self._show(delta.text)
        else:
            write(delta.text)
        self._end = delta.offset + len(delta.text.encode())
        self._last = delta.text[-1:] or self._last

    def close(self) -> None:
        """End the last line on a terminal, so that a shell's prompt begins a line of its own."""
        if on_terminal() and self._last != "\n":
            write(visible(self._return) + "\n")
            self._last, self._return = "\n", ""

    def _show(self, text: str) -> None:
        text = self._return + text
        shown = text.removesuffix("\r")
        self._return = text[len(shown) :]
        write(visible(shown))

    def _take_back(self, offset: int) -> None:
        if self._begin is not None and offset >= self._end:
            return
        if on_terminal():
            self.close()
            say(f"the job started over: what follows replaces the text from byte {offset} on")
        elif self._file_place is not None and self._begin is not None and offset >= self._begin:
            place = self._file_place + offset - self._begin
            os.ftruncate(STDOUT, place)
            os.lseek(STDOUT, place, os.SEEK_SET)
        else:
            raise CommandError(
                f"the job started over: the text from byte {offset} on is void, and cannot be taken back", Exit.REWOUND
            )


def _place_in_file() -> int | None:
    """Return where standard output stands in its file. None if it is no file, or one that others append to."""
    try:
        import fcntl
    except ImportError:
        # Windows, where nobody tells whether the file is appended to.
        return None
    if not stat.S_ISREG(os.fstat(STDOUT).st_mode) or fcntl.fcntl(STDOUT, fcntl.F_GETFL) & os.O_APPEND:
        return None
    return os.lseek(STDOUT, 0, os.SEEK_CUR)
