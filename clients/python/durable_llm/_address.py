"""What gRPC does not check of an address."""

import re
from typing import Final

_PORT: Final = re.compile(r":(\d+)$", re.ASCII)
_MAX_PORT: Final = 65535


def require_ports(address: str) -> None:
    """Raise ValueError for a port above 65535. gRPC would call another one, that with the same lowest 16 bits."""
    if address.startswith("unix"):
        return
    for one in address.split(","):
        if (found := _PORT.search(one)) is not None and not 0 < int(found[1][:6]) <= _MAX_PORT:
            raise ValueError(f"{address}: a port is a number from 1 to {_MAX_PORT}, not {found[1]}")
