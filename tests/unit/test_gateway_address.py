"""An address with a port that does not exist is refused. gRPC calls another port, that with the same lowest 16 bits."""

import pytest
from pydantic import ValidationError

from durable_llm import AsyncClient, Client
from durable_llm._address import require_ports
from services.http.settings import HttpSettings

WRONG = (
    "127.0.0.1:99999",
    "[::1]:65536",
    "dns:///name:70000",
    "ipv4:10.0.0.1:1,10.0.0.2:65536",
    "a:0",
    "a:" + "9" * 5000,
)


@pytest.mark.parametrize("address", WRONG, ids=lambda address: address[:20])
async def test_a_port_that_does_not_exist_is_refused(address: str) -> None:
    with pytest.raises(ValueError, match="a port is a number"):
        AsyncClient(address)
    with pytest.raises(ValueError, match="a port is a number"):
        Client(address)
    with pytest.raises(ValidationError, match="a port is a number"):
        HttpSettings(gateway=address)


@pytest.mark.parametrize(
    "address",
    ["127.0.0.1:50051", "[::1]:65535", "::1", "dns:///name", "name", "ipv4:10.0.0.1:1,10.0.0.2:2", "unix:70000"],
)
def test_other_addresses_are_grpcs(address: str) -> None:
    require_ports(address)
