"""The parameters of a request. Each is taken once; what nobody takes is refused, so that none is ever ignored."""

from collections.abc import Mapping, Sequence
from typing import Any, Final, TypeVar

from openai_api.errors import invalid, unsupported

T = TypeVar("T")

_INT32: Final = 2**31
_INT64: Final = 2**63


class Parameters:
    """The members of a JSON object. A member that is null is the same as one that is missing."""

    def __init__(self, body: object, path: str = "", names: dict[str, str] | None = None) -> None:
        """`path` is the object's place in the body, empty for the body itself. Raises InvalidBody if it is no object.

        `names` are those of the body's.
        """
        if not isinstance(body, Mapping):
            raise invalid(path or "body", "must be a JSON object")
        self._members: dict[str, Any] = {name: value for name, value in body.items() if value is not None}
        self._path = path
        self.names: dict[str, str] = {} if names is None else names
        """The parameter that the caller has set each field of the job by, where the names differ."""

    def path(self, name: str) -> str:
        """Return a member's path in the body."""
        return f"{self._path}.{name}" if self._path else name

    def any(self, name: str) -> Any:
        """Return a member of any type; None if it is missing."""
        return self._members.pop(name, None)

    def text(self, name: str) -> str | None:
        """Return a string."""
        value = self._members.pop(name, None)
        return None if value is None else text_of(value, self.path(name))

    def boolean(self, name: str, *, otherwise: bool = False) -> bool:
        """Return a boolean, `otherwise` if it is missing."""
        value = self._members.pop(name, otherwise)
        if not isinstance(value, bool):
            raise invalid(self.path(name), "must be true or false")
        return value

    def number(self, name: str) -> float | None:
        """Return a number."""
        value = self._members.pop(name, None)
        if value is not None and (isinstance(value, bool) or not isinstance(value, int | float)):
            raise invalid(self.path(name), "must be a number")
        try:
            return None if value is None else float(value)
        except OverflowError:
            raise invalid(self.path(name), "is out of range") from None

    def integer(self, name: str, bound: int = _INT32) -> int | None:
        """Return an integer of at least `-bound`, below `bound`."""
        value = self._members.pop(name, None)
        if value is None:
            return None
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if isinstance(value, bool) or not isinstance(value, int):
            raise invalid(self.path(name), "must be an integer")
        if not -bound <= value < bound:
            raise invalid(self.path(name), "is out of range")
        return value

    def long(self, name: str) -> int | None:
        """Return an integer of 64 bits."""
        return self.integer(name, _INT64)

    def texts(self, name: str) -> list[str] | None:
        """Return a list of strings; a string alone is a list of one."""
        value = self._members.pop(name, None)
        if value is None:
            return None
        values = [value] if isinstance(value, str) else value
        if not isinstance(values, list):
            raise invalid(self.path(name), "must be a string or a list of strings")
        return [text_of(item, f"{self.path(name)}[{index}]") for index, item in enumerate(values)]

    def members(self, name: str) -> "Parameters | None":
        """Return an object's members."""
        value = self._members.pop(name, None)
        return None if value is None else Parameters(value, self.path(name), self.names)

    def allow(self, name: str, *values: object) -> None:
        """Accept a parameter that has no effect with these values. Raises InvalidBody for any other value."""
        value = self._members.pop(name, None)
        if value is not None and not any(type(value) is type(known) and value == known for known in values):
            why = f"it may only be {', '.join(map(repr, values))}" if values else ""
            raise unsupported(self.path(name), why)

    def require_all_taken(self) -> None:
        """Raise InvalidBody for a member that nobody has taken."""
        for name in self._members:
            raise unsupported(self.path(name))


def text_of(value: object, path: str) -> str:
    """Return the value, which must be a string of Unicode characters. Raises InvalidBody."""
    if not isinstance(value, str):
        raise invalid(path, "must be a string")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise invalid(path, "holds a surrogate, which is no character") from None
    return value


def required(value: T | None, path: str) -> T:
    """Return the value. Raises InvalidBody if it is missing."""
    if value is None:
        raise invalid(path, "is required")
    return value


def list_of(value: object, path: str) -> Sequence[object]:
    """Return the value, which must be a list. Raises InvalidBody."""
    if not isinstance(value, list):
        raise invalid(path, "must be a list")
    return value
