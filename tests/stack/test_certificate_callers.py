"""Every method with each kind of client certificate, as test_authentication has it for keys and tokens."""

import json
import re
from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack

import grpc
import pytest

from deploy.local.stack import Stack
from services.gateway import scopes
from tests.stack.test_authentication import (
    DENIED,
    INVALID,
    MISSING,
    REQUESTS,
    call,
    nothing_at,
    reason_of,
)
from tests.support.bad_requests import PATHS
from tests.support.certificates import Authority, credentials
from tests.support.jobs import details_of

OF_SCOPE = sorted(set(scopes.OF_METHOD.values()))
SPIFFE = "spiffe://test"


def rules() -> str:
    """Return a rule for those who have one scope, for those who lack it, and for a front."""
    made = [{"pattern": f"{SPIFFE}/front", "scopes": ["proxy"]}]
    for scope in OF_SCOPE:
        name, wildcard = re.escape(scope.replace(":", "/")), f"{scope.partition(':')[0]}:*"
        made.append({"pattern": f"{SPIFFE}/with/{name}", "scopes": [scope]})
        made.append({"pattern": f"{SPIFFE}/without/{name}", "scopes": sorted(scopes.SCOPES - {scope, wildcard})})
    return json.dumps(made)


@pytest.fixture(scope="module")
async def channels(
    stack: Stack, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[Mapping[str, grpc.aio.Channel]]:
    """A gateway that asks for certificates, and a channel for each caller by its SPIFFE id."""
    ca = Authority(tmp_path_factory.mktemp("certified"))
    settings = {**ca.issue("server").environment("GATEWAY_TLS_", ca), "GATEWAY_CLIENT_CERTIFICATES": rules()}
    gateway = stack.add("gateway", settings)
    of_scope = [f"{kind}/{scope.replace(':', '/')}" for kind in ("with", "without") for scope in OF_SCOPE]
    await gateway.start()
    async with AsyncExitStack() as exits:
        exits.push_async_callback(gateway.terminate)
        await gateway.wait_ready()
        yield {
            caller: await exits.enter_async_context(
                grpc.aio.secure_channel(
                    stack.address(gateway.name),
                    credentials(ca, ca.issue_spiffe(caller.replace("/", "-"), f"{SPIFFE}/{caller}")),
                    # A connection, and so a certificate, of its own.
                    (("grpc.use_local_subchannel_pool", 1),),
                )
            )
            for caller in ("front", "nobody", *of_scope)
        }


@pytest.mark.parametrize("method", REQUESTS)
@pytest.mark.parametrize("caller", ["front", "nobody", "without", "with"])
async def test_a_certificate_calls_what_its_rule_says(
    channels: Mapping[str, grpc.aio.Channel], method: str, caller: str
) -> None:
    scope = scopes.OF_METHOD[f"/{PATHS[method]}"]
    name = caller if caller in channels else f"{caller}/{scope.replace(':', '/')}"
    if caller == "with":
        error = await call(channels[name], method, ())
        # Two need other scopes as well, and no gateway knows the pipeline.
        otherwise = {"CreateBatch": "MISSING_SCOPE", "DeleteUser": "MISSING_SCOPE", "SubmitPipeline": "INVALID_REQUEST"}
        assert (reason_of(error)[1] if error is not None else None) == otherwise.get(method, nothing_at(method))
        return
    # Before a byte of the request is parsed.
    error = await call(channels[name], method, (), b"\xff\xff\xff")
    assert reason_of(error) == {"front": MISSING, "nobody": INVALID, "without": DENIED}[caller]
    if caller == "without":
        assert error is not None
        assert details_of(error)["ErrorInfo"].metadata["scope"] == scope
