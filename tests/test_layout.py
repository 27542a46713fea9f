"""The rules of the layout: who may import whom, and how big a module may be."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
OURS = {"deploy", "jobs", "llm_pb", "models", "payload_converter", "runtime", "services"}

MAY_IMPORT = {
    "llm_pb": set(),
    "payload_converter": {"llm_pb"},
    "jobs": {"llm_pb"},
    "runtime": {"payload_converter", "jobs", "llm_pb"},
    "services": {"jobs", "models", "runtime", "llm_pb"},
    "services/codec": {"payload_converter", "runtime"},
}
"""What a package may import of ours, besides itself. Only one service takes payloads apart for itself."""

ONLY = {
    "nats": {"jobs/feed_nats.py", "jobs/feed_nats_consumers.py", "services/notifier/sink_nats.py"},
    "aiokafka": {"services/notifier/sink_kafka.py"},
    "aiohttp": {"payload_converter/codec_server.py", "services/notifier/sink_webhook.py"},
    "vllm": {
        "services/gpu_worker/engine_vllm.py",
        "services/gpu_worker/vllm_options.py",
        "services/gpu_worker/vllm_requests.py",
    },
    "torch": {
        "services/gpu_worker/engine_torch.py",
        "services/gpu_worker/torch_batch.py",
        "services/gpu_worker/torch_model.py",
        "services/gpu_worker/torch_sampling.py",
    },
}
"""Heavy dependencies and the only modules that import them."""


PACKAGES = [name for name in MAY_IMPORT if "/" not in name]


def modules() -> list[Path]:
    return [path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))]


def imports(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(ROOT)))
def test_a_module_keeps_the_import_rules(path: Path) -> None:
    parts = path.relative_to(ROOT).parts
    allowed = MAY_IMPORT.get("/".join(parts[:2]), MAY_IMPORT[parts[0]])
    for name in imports(path):
        top, *rest = name.split(".")
        if top in OURS and top != parts[0]:
            assert top in allowed, f"{name} is not for {path.parent}"
        if top == "services" and parts[0] == "services":
            assert rest[0] == parts[1], "no service imports another"
        if top in ONLY:
            assert str(path.relative_to(ROOT)) in ONLY[top], f"{top} has its own module"


def test_entry_points_only_join_parts() -> None:
    for path in (ROOT / "services").glob("*/__main__.py"):
        code = [line for line in path.read_text().splitlines() if line.strip()]
        assert len(code) < 60, path


def test_a_module_holds_one_thing() -> None:
    big = {p: n for p in modules() if "_pb2" not in p.name and (n := len(p.read_text().splitlines())) > 320}
    assert not big


def test_a_worker_imports_only_its_engine() -> None:
    """The module of the seam loads no engine; the simulated one brings neither torch nor vllm."""
    code = (
        "import sys; from services.gpu_worker import __main__, engine; "
        "engine.create_engine('simulated', engine.EngineConfig('', 1)); "
        "sys.exit(bool({'torch', 'vllm', 'transformers'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0
