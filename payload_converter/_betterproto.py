"""Recognises betterproto messages. The only module that knows how betterproto lays out its classes.

It imports neither betterproto nor betterproto2: both stay optional, and inside the workflow sandbox, which imports
modules again, an isinstance check against an outer copy would fail. A class is known by the names of its bases, and its
protobuf name is found like this:

- betterproto2: generated code registers each class with its full name in the `default_message_pool` that its module
  imports, so the name is exact, nested messages included.
- betterproto 2.0.0b: nothing of the kind exists, so the module path stands for the package. A class `JobRequest` in
  `anything.llm.v1` is `llm.v1.JobRequest` if protobuf knows that name; the longest matching end of the path wins.
  The generator renames nested messages and unusual capitals beyond recovery: those need betterproto2.
"""

import sys
from collections.abc import Iterator
from typing import Any

_LIBRARIES = ("betterproto2", "betterproto")


def is_class(candidate: Any) -> bool:
    """Whether this is a message class that betterproto or betterproto2 generated."""
    return isinstance(candidate, type) and any(
        base.__name__ == "Message" and base.__module__ in _LIBRARIES for base in candidate.__mro__[1:]
    )


def possible_names(cls: type) -> Iterator[str]:
    """Yield the full protobuf names that the class may stand for, the most certain first."""
    pool = getattr(sys.modules.get(cls.__module__), "default_message_pool", None)
    if pool is not None:
        # A type URL: everything up to the last slash is the host.
        yield pool.type_to_url[cls].rpartition("/")[2]
        return
    path = cls.__module__.split(".")
    for start in range(len(path) + 1):
        yield ".".join([*path[start:], cls.__name__])
