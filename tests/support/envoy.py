"""The Envoy of deploy/envoy, which `make tools` installs."""

import shutil
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from deploy.local.ports import free_port
from deploy.local.process import Process
from tests.support.certificates import Authority
from tests.support.paths import ROOT

RECIPE = ROOT / "deploy" / "envoy"
ORIGIN = "https://app.example.com"
"""The origin that the recipe allows."""


@dataclass(frozen=True)
class Envoy:
    """An Envoy, its addresses and its certificates."""

    process: Process
    address: str
    admin: str
    tls: Authority


def envoy_program() -> str:
    """Return the path of Envoy. It skips the test without Envoy."""
    found = shutil.which("envoy", path=str(ROOT / ".tools" / "envoy" / "bin")) or shutil.which("envoy")
    if found is None:
        pytest.skip("Envoy is not installed: make tools")
    return found


def connection_manager(recipe: Any) -> Any:
    """Return the part of the recipe that serves clients."""
    return recipe["static_resources"]["listeners"][0]["filter_chains"][0]["filters"][0]["typed_config"]


def http_filter(recipe: Any, name: str) -> Any:
    filters = {one["name"]: one["typed_config"] for one in connection_manager(recipe)["http_filters"]}
    return filters[f"envoy.filters.http.{name}"]


def routes_of(recipe: Any) -> list[Any]:
    """Return what the routes to the gateways do."""
    (host,) = connection_manager(recipe)["route_config"]["virtual_hosts"]
    return [one["route"] for one in host["routes"] if "route" in one]


@asynccontextmanager
async def running_envoy(
    folder: Path, ca: Authority, gateways: Iterable[str], change: Callable[[Any], None] = lambda recipe: None
) -> AsyncIterator[Envoy]:
    """Run the recipe while the context is open, in front of the gateways, whose CA is `ca`.

    Its own certificate for the gateways is `spiffe://test/envoy`. The recipe's addresses and the gateways' name differ
    from the file, and what `change` alters.
    """
    program, port, admin_port = envoy_program(), free_port(), free_port()
    (folder / "tls").mkdir(parents=True)
    clients = Authority(folder / "tls", "clients")
    clients.issue("server")
    shutil.copy(ca.path, folder / "tls" / "ca.pem")
    proxy = ca.issue_spiffe("proxy", "spiffe://test/envoy")
    shutil.copy(proxy.cert, folder / "tls" / "proxy.pem")
    shutil.copy(proxy.key, folder / "tls" / "proxy.key")
    shutil.copytree(RECIPE / "sds", folder / "sds")
    recipe = yaml.safe_load((RECIPE / "envoy.yaml").read_text().replace("gateway.llm.internal", "localhost"))
    recipe["admin"]["address"]["socket_address"]["port_value"] = admin_port
    listener, cluster = recipe["static_resources"]["listeners"][0], recipe["static_resources"]["clusters"][0]
    listener["address"]["socket_address"] = {"address": "127.0.0.1", "port_value": port}
    cluster["load_assignment"]["endpoints"][0]["lb_endpoints"] = [endpoint(address) for address in gateways]
    change(recipe)
    (folder / "envoy.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False))
    admin = f"http://127.0.0.1:{admin_port}"

    async def serves(process: Process) -> bool:
        async with httpx.AsyncClient(verify=False, trust_env=False) as client:
            try:
                return (await client.get(f"https://127.0.0.1:{port}/healthz")).status_code == httpx.codes.OK
            except httpx.TransportError:
                return False

    process = Process(
        "envoy",
        # Several on one machine share no memory for a hot restart.
        (program, "-c", "envoy.yaml", "--disable-hot-restart", "--concurrency", "2", "--drain-time-s", "5"),
        {},
        log_path=folder / "envoy.log",
        probe=serves,
        working_dir=folder,
        start_timeout=60,
        stop_grace=20,
    )
    await process.start()
    try:
        await process.wait_ready()
        yield Envoy(process, f"127.0.0.1:{port}", admin, clients)
    finally:
        await process.terminate()


def endpoint(address: str) -> Any:
    host, _, port = address.rpartition(":")
    return {"endpoint": {"address": {"socket_address": {"address": host, "port_value": int(port)}}}}
