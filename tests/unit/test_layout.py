"""Rules of the layout: which package may import which, and the maximum size of a module."""

import ast
import functools
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.paths import ROOT

OURS = {
    "batches",
    "deploy",
    "durable_llm",
    "encryption",
    "feed",
    "jobs",
    "llm_pb",
    "models",
    "openai_api",
    "payload_converter",
    "pipelines",
    "runtime",
    "services",
    "store",
    "workflows",
}

MAY_IMPORT = {
    "llm_pb": set(),
    "durable_llm": {"llm_pb"},
    "encryption": set(),
    "payload_converter": {"encryption", "llm_pb"},
    "jobs": {"llm_pb", "payload_converter"},
    "openai_api": {"jobs", "llm_pb"},
    "batches": {"encryption", "jobs", "llm_pb", "openai_api", "store"},
    "workflows": {"jobs", "llm_pb"},
    "pipelines": {"jobs", "llm_pb", "workflows"},
    "feed": {"encryption", "jobs", "llm_pb", "runtime"},
    "runtime": {"encryption", "payload_converter"},
    "store": {"encryption", "jobs", "llm_pb"},
    "services/gpu_worker": {
        "batches",
        "encryption",
        "feed",
        "jobs",
        "models",
        "payload_converter",
        "runtime",
        "llm_pb",
        "store",
    },
    "services/notifier": {"encryption", "feed", "jobs", "llm_pb", "runtime"},
    "services/trainer": {"encryption", "jobs", "llm_pb", "models", "payload_converter", "runtime", "store"},
    "services/codec": {"encryption", "payload_converter", "runtime"},
    "services/http": {"durable_llm", "jobs", "llm_pb", "openai_api", "runtime"},
    "services/gateway": {
        "batches",
        "encryption",
        "payload_converter",
        "feed",
        "jobs",
        "models",
        "pipelines",
        "runtime",
        "llm_pb",
        "store",
        "workflows",
    },
}
"""Our packages that each package may import, next to itself. The codec reads payloads, the gateway runs
workflows, the HTTP front is the gateway's client. CONTRIBUTING.md has the same table."""

ONLY = {
    "botocore": {"encryption/kms.py"},
    "cryptography": {
        "encryption/chunks.py",
        "encryption/cipher.py",
        "encryption/keyring.py",
        "runtime/auth_certificates.py",
        "services/http/signin/keys.py",
    },
    "nats": {
        "feed/nats.py",
        "feed/nats_answers.py",
        "feed/nats_consumers.py",
        "feed/nats_stream.py",
        "runtime/audit_nats.py",
        "runtime/nats_client.py",
        "services/notifier/sinks/nats.py",
    },
    "aiokafka": {"services/notifier/sinks/kafka.py"},
    "asyncpg": {"services/notifier/sinks/postgres.py"},
    "aiohttp": {
        "encryption/kms.py",
        "runtime/bounded_fetch.py",
        "services/codec/server.py",
        "services/notifier/sinks/webhook.py",
    },
    "obstore": {"store/objects.py"},
    "jwt": {"runtime/auth_jwt.py", "runtime/jwt_keys.py"},
    "uvicorn": {"services/http/connection.py", "services/http/server.py"},
    "vllm": {
        f"services/gpu_worker/engines/{name}.py" for name in ("vllm", "vllm_options", "vllm_requests", "vllm_stats")
    },
    "torch": {
        f"services/gpu_worker/engines/torch{part}.py"
        for part in ("", "_batch", "_generation", "_model", "_sampling", "_structured")
    }
    | {"services/gpu_worker/engines/diffusers.py", "services/trainer/training.py"},
    "safetensors": {"services/trainer/training.py"},
    "peft": {"services/trainer/adapters.py"},
    "openai": {
        f"services/gpu_worker/engines/openai{part}.py"
        for part in ("", "_background", "_errors", "_images", "_transport")
    },
    "httpx2": {"services/gpu_worker/engines/openai_transport.py"},
    "diffusers": {"services/gpu_worker/engines/diffusers.py"},
    "xgrammar": {"services/gpu_worker/engines/torch_structured.py"},
}
"""Modules that may import each heavy dependency."""

DETERMINISTIC = {
    "__future__",
    "asyncio",
    "collections",
    "contextlib",
    "contextvars",
    "dataclasses",
    "datetime",
    "functools",
    "google",
    "typing",
    "jobs",
    "llm_pb",
    "workflows",
}
"""Top-level modules that workflow code may import, next to those in OF_TEMPORAL: no clock, socket or randomness."""
OF_TEMPORAL = {"temporalio", "temporalio.common", "temporalio.exceptions", "temporalio.workflow"}
OF_PIPELINES = {"json", "pipelines", "types"}
"""Top-level modules that the code of pipelines may import as well."""
PURE = {
    "base64",
    "functools",
    "hashlib",
    "idna",
    "inspect",
    "ipaddress",
    "itertools",
    "json",
    "math",
    "operator",
    "payload_converter",
    "re",
    "urllib.parse",
}
"""Modules that jobs/, which runs inside workflows, may import as well: their results depend on the arguments alone."""
OUTSIDE_WORKFLOWS = {
    # Reads Temporal's description of a workflow, which only its clients have.
    "jobs/pending.py",
    # Asks workflows for their records, which only clients of Temporal can.
    "jobs/records.py",
    # Takes the tokenizer of a model, which gateway and worker load from a file.
    "jobs/tokenizer.py",
}
"""Modules of jobs/ that several services share and no workflow may reach."""


NOT_OF_CALLS = {
    "effects.py",
    "updates.py",
    # An update that is always refused, and so changes nothing.
    "told.py",
    # The books of the quotas.
    "quotas/ledgers.py",
    # The steps of a deletion that was recorded.
    "deletion/steps.py",
    "deletion/owned.py",
    # A job that is settled tells who waits for it.
    "waiters.py",
    # The lease of a job that is watched.
    "streams/watch_lease.py",
    # The files of a batch or pipeline that was recorded, and the jobs of such a batch.
    "files/produced.py",
    "batches/watched_jobs.py",
}
"""Modules of the gateway that may start and signal workflows."""

PACKAGES = sorted({name.partition("/")[0] for name in MAY_IMPORT})


def modules(*folders: str) -> list[Path]:
    return [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]


@functools.cache
def import_statements(path: Path) -> list[ast.Import | ast.ImportFrom]:
    return [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Import | ast.ImportFrom)]


def imports(path: Path) -> Iterator[str]:
    for node in import_statements(path):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif node.module:
            yield node.module


@pytest.mark.parametrize("package", PACKAGES)
def test_modules_keep_the_import_rules(package: str) -> None:
    assert modules(package)
    assert not [fault for path in modules(package) for fault in faults(path)]


def faults(path: Path) -> Iterator[str]:
    """Yield a sentence for each import of a module that breaks a rule."""
    parts = path.relative_to(ROOT).parts
    here = "/".join(parts)
    allowed = MAY_IMPORT.get("/".join(parts[:2]), MAY_IMPORT.get(parts[0], set()))
    for name in imports(path):
        top, *rest = name.split(".")
        if top in OURS and top != parts[0] and top not in allowed:
            yield f"{here} may not import {name}"
        if top == "services" and parts[0] == "services" and rest[0] != parts[1]:
            yield f"{here}: a service may not import another service, as {name}"
        if top in ONLY and here not in ONLY[top]:
            yield f"{here}: only {ONLY[top]} may import {top}"
        if parts[0] == "pipelines" and top not in DETERMINISTIC | OF_PIPELINES and name not in OF_TEMPORAL:
            yield f"{here}: workflow code may not import {name}"
        if parts[0] == "workflows" and top not in DETERMINISTIC and name not in OF_TEMPORAL:
            yield f"{here}: workflow code may not import {name}"
        is_pure = top in DETERMINISTIC or name in OF_TEMPORAL | PURE
        if parts[0] == "jobs" and here not in OUTSIDE_WORKFLOWS and not is_pure:
            yield f"{here}: jobs/ runs inside workflows and may not import {name}"


def test_only_effects_changes_what_a_call_of_the_api_asks_for() -> None:
    """It records each change first."""
    changes = (".start_workflow", ".signal", "execute_update", ".create_schedule")
    found = {
        (str(path.relative_to(ROOT)), ast.unparse(node.func))
        for path in modules("services/gateway")
        if str(path.relative_to(ROOT / "services" / "gateway")) not in NOT_OF_CALLS
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call)
        and ast.unparse(node.func).endswith(changes)
        and not ast.unparse(node.func).startswith("self._effects.")
    }
    assert not found


def test_workflows_reach_no_module_that_is_outside_of_them() -> None:
    reached, found = set(), {path for room in ("pipelines", "workflows") for path in (ROOT / room).rglob("*.py")}
    while found:
        reached |= found
        found = {module for path in found for module in modules_of_ours(path)} - reached
    assert not {str(path.relative_to(ROOT)) for path in reached} & OUTSIDE_WORKFLOWS
    assert {path.parent.name for path in reached} == {
        "jobs",
        "llm_pb",
        "payload_converter",
        "pipelines",
        "workflows",
    }


def modules_of_ours(path: Path) -> Iterator[Path]:
    """Yield the files of the suite that a module imports."""
    for node in import_statements(path):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif node.module:
            # The names of a `from` may be modules, too.
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        else:
            continue
        for name in names:
            place = ROOT.joinpath(*name.split("."))
            yield from (file for file in (place.with_suffix(".py"), place / "__init__.py") if file.is_file())


def test_the_layout_of_contributing_is_complete() -> None:
    """It names every package with the packages that it may import, and every proto file."""
    page = (ROOT / "CONTRIBUTING.md").read_text()
    rows = dict(re.findall(r"^\| `([\w/]+)/` \|.*\| ([^|]*?) ?\|$", page, re.MULTILINE))
    named = {path: set(re.findall(r"`(\w+)`", imports)) for path, imports in rows.items()}
    named["durable_llm"] = named.pop("clients/python", set())
    assert {path: named.get(path) for path in MAY_IMPORT} == MAY_IMPORT
    for proto in (ROOT / "proto").glob("*.proto"):
        assert f"`proto/{proto.name}`" in page


def test_entry_points_only_join_parts() -> None:
    for path in (ROOT / "services").glob("*/__main__.py"):
        code = [line for line in path.read_text().splitlines() if line.strip()]
        assert len(code) < 65, path


def test_a_module_holds_one_thing() -> None:
    big = {p: n for p in modules(*PACKAGES) if "_pb2" not in p.name and (n := len(p.read_text().splitlines())) > 320}
    assert not big


def test_the_http_front_imports_nothing_of_temporal() -> None:
    """It is a client of the gateway. Temporal's library and aiohttp would double its start."""
    code = (
        "import sys; from services.http import __main__; "
        "sys.exit(bool({'aiohttp', 'nats', 'temporalio'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


def test_a_worker_imports_only_its_engine() -> None:
    """The module of the Engine protocol loads no engine. The simulated engine loads neither torch nor vllm."""
    code = (
        "import sys; from services.gpu_worker import __main__; from services.gpu_worker.engines import engine; "
        "engine.create_engine('simulated', engine.EngineConfig('', 1)); "
        "sys.exit(bool({'torch', 'vllm', 'transformers'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0
