"""A misspelt setting is reported by name instead of being ignored silently."""

import asyncio
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from deploy.local.settings import StackSettings
from deploy.settings_table import CLASSES
from feed.feed import FeedSettings
from runtime.environment import Unknown, unknown_variables
from services.gateway.settings import GatewaySettings
from tests.support.commands import run_service
from tests.support.local import child_pids, environment
from tests.support.paths import ROOT
from tests.support.stacks import stack_settings


@pytest.fixture
def settings(tmp_path: Path) -> StackSettings:
    return stack_settings(tmp_path / "stack", start_timeout=120)


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("STACK_ENGIN", "STACK_ENGINE"),
        ("STACK_TEMPORAL_PROT", "STACK_TEMPORAL_PORT"),
        ("GATEWAY_MAX_WATCHER", "GATEWAY_MAX_WATCHERS"),
        ("GPU_WORKER_MAX_CONCURENT", "GPU_WORKER_MAX_CONCURRENT"),
        ("NOTIFIER_WEBHOOK_SECRET", "NOTIFIER_WEBHOOK_SECRETS"),
        ("FEED_MAX_BYTE", "FEED_MAX_BYTES"),
        ("CODEC_ALLOWED_ORIGIN", "CODEC_ALLOWED_ORIGINS"),
        ("TEMPORAL_GRPC_COMPRESION", "TEMPORAL_GRPC_COMPRESSION"),
        ("LOG_LEVELL", "LOG_LEVEL"),
        ("GATWAY_PORT", "GATEWAY_PORT"),
        ("GPUWORKER_ENGINE", "GPU_WORKER_ENGINE"),
        ("STACK_ROOT", None),
        ("GATEWAY_XYZZY", None),
    ],
)
def test_a_variable_that_is_no_setting_is_found(name: str, meant: str | None) -> None:
    assert unknown_variables([name], CLASSES) == [Unknown(name, meant)]


def test_other_variables_are_left_alone() -> None:
    """They are settings in any case, variables of other programs, and those of a Kubernetes Service `gateway`."""
    settings = [f"{kind.model_config['env_prefix']}{name}".upper() for kind in CLASSES for name in kind.model_fields]
    links = "SERVICE_HOST SERVICE_PORT SERVICE_PORT_GRPC PORT_50051_TCP PORT_50051_TCP_ADDR PORT_50051_TCP_PROTO"
    others = [
        "PATH",
        "TEMPORAL_API_KEY",
        "TEMPORAL_ADDRESS",
        "LOG_DIR",
        "OTEL_SERVICE_NAME",
        "gateway_port",
        "NATS_PORT",
    ]
    assert unknown_variables([*settings, *others, *(f"GATEWAY_{name}" for name in links.split())], CLASSES) == []
    assert unknown_variables(["NOTIFIER_X", "STACK_ENGIN"], [GatewaySettings, FeedSettings]) == []


async def up(**variables: str) -> tuple[int, str, str]:
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "deploy.local", "up"),
        env={**os.environ, **variables},
        cwd=ROOT,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    out, err = await process.communicate()
    return process.returncode or 0, out.decode(), err.decode()


@pytest.mark.parametrize(
    ("variable", "words"),
    [
        ({"STACK_ENGIN": "simulated"}, "STACK_ENGIN is no setting: do you mean STACK_ENGINE?"),
        ({"GATEWAY_POL": "PT1S"}, "GATEWAY_POL is no setting: do you mean GATEWAY_POLL?"),
        ({"STACK_ENGINE": "tensorflow"}, "STACK_ENGINE: "),
    ],
)
async def test_up_starts_nothing_with_a_setting_that_cannot_be_meant(
    settings: StackSettings, variable: dict[str, str], words: str
) -> None:
    status, out, err = await up(**{**environment(settings), **variable})
    assert (status, out) == (1, "")
    assert words in err
    assert "Traceback" not in err
    assert not settings.state_dir.exists()


async def test_up_starts_nothing_for_an_engine_that_is_not_installed(settings: StackSettings) -> None:
    try:
        __import__("vllm")
        pytest.skip("vllm is installed")
    except ImportError:
        pass
    status, out, err = await up(**{**environment(settings), "STACK_ENGINE": "vllm"})
    assert (status, out) == (1, "")
    assert "vllm" in err
    assert not settings.state_dir.exists()


async def test_a_service_names_a_setting_that_it_does_not_know() -> None:
    """It continues, because an older build may get a newer build's settings."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "services.codec"),
        env={**os.environ, "CODEC_PORT": "0", "CODEC_METRICS_PORT": "0", "CODEC_ALLOWED_ORIGIN": "http://secret"},
        cwd=ROOT,
        stderr=asyncio.subprocess.PIPE,
    )
    assert process.stderr is not None
    log = b""
    async with asyncio.timeout(60):
        while b"listening on http" not in log:
            log += await process.stderr.readline()
    assert b"CODEC_ALLOWED_ORIGIN is no setting: do you mean CODEC_ALLOWED_ORIGINS?" in log
    assert b"secret" not in log
    process.send_signal(signal.SIGTERM)
    assert await process.wait() == 0


def imports(pid: int) -> bool:
    """Return True once the process has loaded one of the first packages that it imports."""
    return "pydantic_core" in Path(f"/proc/{pid}/maps").read_text()


def starts(pid: int) -> bool:
    return bool(child_pids(pid))


@pytest.mark.skipif(sys.platform != "linux", reason="reads how far a process is where Linux shows it")
@pytest.mark.parametrize("so_far", [imports, starts])
async def test_an_early_interrupt_leaves_no_traceback(settings: StackSettings, so_far: Callable[[int], bool]) -> None:
    """The interrupt may come while modules are imported or while the first server starts."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "deploy.local", "demo"),
        env=environment(settings),
        cwd=ROOT,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    while not so_far(process.pid):  # noqa: ASYNC110  # nothing notifies
        await asyncio.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, err = await process.communicate()
    assert process.returncode in (-signal.SIGINT, 130)
    assert err == b""


@pytest.mark.parametrize(
    ("service", "variable", "value", "says"),
    [
        ("gateway", "GATEWAY_PORT", "abc", "GATEWAY_PORT: "),
        ("gateway", "GATEWAY_PAGE_TOKEN_KEY", "no-secret", "GATEWAY_PAGE_TOKEN_KEY: "),
        ("gateway", "GATEWAY_MODELS", "{bad", "GATEWAY_MODELS: is no JSON"),
        ("gateway", "GATEWAY_MODELS", '[{"name": "x"}]', "GATEWAY_MODELS.0.context_tokens: "),
        ("gpu_worker", "GPU_WORKER_ENGINE", "abacus", "GPU_WORKER_ENGINE: "),
        ("notifier", "NOTIFIER_USERS", "[", "NOTIFIER_USERS: is no JSON"),
        ("notifier", "LOG_LEVEL", "LOUD", "LOG_LEVEL: "),
        ("gpu_worker", "GPU_WORKER_ENGINE_OPTIONS", '{"xyz": 17}', "GPU_WORKER_ENGINE_OPTIONS.xyz: Extra inputs"),
        ("gpu_worker", "FEED_URL", "http://feed.example", "FEED_URL: "),
        ("notifier", "NOTIFIER_DNS_SERVERS", '["ns.example"]', "NOTIFIER_DNS_SERVERS.0: "),
    ],
)
async def test_a_wrong_setting_is_named_by_its_variable(
    service: str, variable: str, value: str, says: str, tmp_path: Path
) -> None:
    """The error has neither the value nor a traceback."""
    ended = await run_service(service, tmp_path, **{variable: value})
    assert ended.status == 1
    assert says in ended.output
    assert value not in ended.output
    assert "Traceback" not in ended.output


@pytest.mark.parametrize("file", [False, True], ids=["a missing folder", "a file"])
async def test_a_folder_that_is_no_key_store_is_named_with_what_to_do(file: bool, tmp_path: Path) -> None:
    """The service ends with one line, without a traceback."""
    folder = tmp_path / "keys"
    if file:
        folder.write_text("")
    variables = {"ENCRYPTION_KEY_STORE": str(folder), "ENCRYPTION_KEYRING": str(tmp_path / "keyring.json")}
    ended = await run_service("notifier", tmp_path, **variables)
    said = ended.output
    assert ended.status == 1
    assert f"ENCRYPTION_KEY_STORE: {folder} is no key store: mount its volume, or create a store with" in said
    assert "Traceback" not in said
