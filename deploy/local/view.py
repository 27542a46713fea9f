"""Shows growing text on a terminal, with a progress bar below it."""

import shutil
import sys
import time
from typing import Final, TextIO

_BAR_WIDTH: Final = 30
_LINE_SECONDS: Final = 0.1
_UP_AND_CLEAR: Final = "\r\x1b[1A\x1b[J"


def progress_bar(percent: float) -> str:
    """Return a bar of fixed width, followed by the number."""
    filled = round(_BAR_WIDTH * percent / 100)
    return f"[{'#' * filled}{'.' * (_BAR_WIDTH - filled)}] {percent:3.0f} %"


class LiveView:
    """Growing text with a progress bar.

    On a terminal the bar stays in place and the text grows above it. Other outputs (a log, a pipe) cannot be rewritten,
    so a line is added periodically: the bar, then the text since the last line.
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
        """Add text, move the bar and set the words after it."""
        self._text += _harmless(text)
        self._bar = f"{progress_bar(percent)}  {words}"
        if self._terminal:
            # The last line still grows, so it stays in the buffer.
            *finished, self._text = self._break(self._text)
            above = "".join(f"{line}\n" for line in finished)
            self._stream.write(f"{_UP_AND_CLEAR}{above}{self._text}\n{self._bar[: self._columns]}")
            self._stream.flush()
        elif time.monotonic() - self._written >= _LINE_SECONDS:
            self._write_line()

    def close(self) -> None:
        """Write the remaining text, and end the line."""
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
    """Return the text without control characters, because a model's output must not control the terminal."""
    return "".join(
        character if character.isprintable() or character == "\n" else "\N{REPLACEMENT CHARACTER}"
        for character in text.expandtabs(4)
    )
