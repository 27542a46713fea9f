"""How often a gateway asks for what only metrics need. Gateways do not know how many they are, and share a limit."""

from datetime import timedelta
from typing import Final

_MAX_PAUSE: Final = timedelta(minutes=1)


class Pace:
    """The pause between two questions: it doubles with each that Temporal refuses, and shrinks slowly afterwards."""

    def __init__(self, interval: timedelta) -> None:
        """`interval` is the shortest pause."""
        self._least = interval
        self._pause = interval

    def after(self, *, accepted: bool) -> float:
        """Return the pause after a question, in seconds."""
        if accepted:
            self._pause = max(0.9 * self._pause, self._least)
        else:
            self._pause = min(2 * self._pause, max(self._least, _MAX_PAUSE))
        return self._pause.total_seconds()
