"""Cookies of the front. A value that is too long for one is spread over a few."""

import math
from typing import Final

from starlette.requests import Request
from starlette.responses import Response

_PART: Final = 3800
"""Maximum number of characters of a value in one cookie. Browsers keep 4,096 bytes with its name and attributes."""
_PARTS: Final = 3
"""Maximum number of cookies of a value. The head of a request has 32 KiB, for all cookies of the host together."""
MAX_VALUE: Final = _PART * _PARTS - 2
"""Maximum number of characters of a value."""


class TooLarge(Exception):
    """The value is too large for a browser to keep."""


class Cookies:
    """Cookies that no module of a page can read and that no page of another site sends along with a form.

    Where pages come by TLS their names begin with `__Host-`: no other host of the domain can set them.
    """

    def __init__(self, *, secure: bool) -> None:
        self._secure = secure

    def read(self, request: Request, name: str) -> str:
        """Return the value. It is empty when there is none or a part is missing."""
        first, _, value = request.cookies.get(self._name(name, 0), "").partition(".")
        if first not in ("1", "2", "3"):
            return ""
        others = [request.cookies.get(self._name(name, number), "") for number in range(1, int(first))]
        return "".join([value, *others]) if all(others) else ""

    def write(self, request: Request, response: Response, name: str, value: str, seconds: float | None) -> None:
        """Store a value of letters, digits, `-` and `_` in the browser, until the browser ends or for some seconds.

        Raises TooLarge for more than MAX_VALUE characters.
        """
        if len(value) > MAX_VALUE:
            raise TooLarge
        # The first cookie holds their number. Cookies of an earlier, longer value may still exist.
        count = math.ceil((len(value) + 2) / _PART)
        text = f"{count}.{value}"
        for number in range(count):
            part = text[number * _PART : (number + 1) * _PART]
            age = max(0, math.ceil(seconds)) if seconds is not None else None
            self._set(response, self._name(name, number), part, age)
        self._delete(request, response, name, count)

    def delete(self, request: Request, response: Response, name: str) -> None:
        """Remove a value from the browser."""
        self._delete(request, response, name, 0)

    def _delete(self, request: Request, response: Response, name: str, first: int) -> None:
        for number in range(first, _PARTS):
            if (part := self._name(name, number)) in request.cookies:
                self._set(response, part, "", 0)

    def _set(self, response: Response, name: str, value: str, age: int | None) -> None:
        # Not `strict`: a link of another site to a job, and the way back from an OpenID provider, bring the session.
        response.set_cookie(name, value, max_age=age, path="/", secure=self._secure, httponly=True, samesite="lax")

    def _name(self, name: str, number: int) -> str:
        return f"{'__Host-' if self._secure else ''}{name}{f'_{number}' if number else ''}"
