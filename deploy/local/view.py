"""How a terminal shows text that is still being written, with a progress bar below it."""

import shutil
import sys
import time
from typing import Final, TextIO

_BAR_WIDTH: Final = 30
_LINE_SECONDS: Final = 0.1
_UP_AND_CLEAR: Final = "\r\x1b[1A\x1b[J"


def progress_bar(percent: float) -> str:
    """Return a bar of fixed width with the number behind it."""
    filled = round(_BAR_WIDTH * percent / 100)
    return f"[{'#' * filled}{'.' * (_BAR_WIDTH - filled)}] {percent:3.0f} %"


class LiveView:
    """Text that grows above a bar.

    On a terminal the bar stays in place and the text grows above it. Anywhere else (a log, a pipe) nothing can be
    taken back, so a line is added now and then: the bar, then the text since the last one.
    """

    def __init__(self, stream: TextIO = sys.stdout) -> None:
        self._stream = stream
        self._terminal = stream.isatty()
        # A line that fills the last column would wrap on some terminals and not on others.
        self._columns = shutil.get_terminal_size().columns - 1
        self._text = ""
        self._bar = ""
        self._written = 0.0
        if self._terminal:
            self._stream.write("\n")

    def update(self, text: str, percent: float, words: str) -> None:
        """Add text, move the bar and put a few words behind it."""
        self._text += _harmless(text)
        self._bar = f"{progress_bar(percent)}  {words}"
        if self._terminal:
            # What stays is the line that still grows.
            *finished, self._text = self._break(self._text)
            above = "".join(f"{line}\n" for line in finished)
            self._stream.write(f"{_UP_AND_CLEAR}{above}{self._text}\n{self._bar[: self._columns]}")
            self._stream.flush()
        elif time.monotonic() - self._written >= _LINE_SECONDS:
            self._write_line()

    def close(self) -> None:
        """Write what has not been written, and end the line."""
        if self._terminal:
            self._stream.write("\n")
            self._stream.flush()
        else:
            self._write_line()

    def _write_line(self) -> None:
        print(f"  {self._bar:<52} {self._text!r}", file=self._stream, flush=True)
        self._text = ""
        self._written = time.monotonic()

    def _break(self, text: str) -> list[str]:
        lines = []
        for line in text.split("\n"):
            pieces = [line[start : start + self._columns] for start in range(0, len(line), self._columns)]
            lines.extend(pieces or [""])
        return lines


def _harmless(text: str) -> str:
    """Return text that cannot steer the terminal: what a model writes is not to be trusted with that."""
    return "".join(
        character if character.isprintable() or character == "\n" else "\N{REPLACEMENT CHARACTER}"
        for character in text.expandtabs(4)
    )
