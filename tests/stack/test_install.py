"""What `make env` installs: by uv from the indexes of pip, by pip where uv fails, and the command `durable-llm`."""

import base64
import hashlib
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from deploy.install import pip_settings, uv_options, uv_settings
from tests.support.paths import ROOT


def pins(name: str) -> set[str]:
    """Return the packages of a lock with their versions."""
    lines = (ROOT / "requirements" / name).read_text().splitlines()
    return {line.split()[0] for line in lines if "==" in line and line[0].isalnum()}


def test_what_runs_the_stack_is_a_part_of_what_tests_need() -> None:
    """The packages for tests are installed on top of those that run the stack."""
    assert pins("run.txt") < pins("dev.txt")
    assert pins("uv.txt") < pins("dev.txt")
    assert not {pin for pin in pins("run.txt") if pin.partition("==")[0] in ("pytest", "mypy", "ruff", "uv", "celery")}


def test_no_command_of_make_lock_has_an_option_twice_that_uv_takes_once() -> None:
    """uv refuses a second --python-version instead of using it."""
    shown = subprocess.run(["make", "-n", "lock"], check=True, cwd=ROOT, capture_output=True, text=True).stdout
    commands = [line for line in shown.replace("\\\n", " ").splitlines() if "uv pip compile" in line]
    assert commands
    for command in commands:
        words = command.split()
        assert words.count("--python-version") == words.count("-o") == 1


def test_the_environment_has_the_command(tmp_path: Path) -> None:
    """It runs in any folder, with the client of a checkout, where `make env` has created the environment."""
    command = (Path(sys.executable).with_name("durable-llm"), "--help")
    shown = subprocess.run(command, check=True, cwd=tmp_path, env={}, capture_output=True, text=True).stdout
    assert "submit" in shown


@pytest.fixture
def index(tmp_path: Path) -> Path:
    """Create a folder for pip's find-links with one package, which exists nowhere else, and its lock."""
    name, info = "durable_llm_nowhere_else", "durable_llm_nowhere_else-1.0.dist-info"
    files = {
        f"{name}.py": b"",
        f"{info}/METADATA": b"Metadata-Version: 2.1\nName: durable-llm-nowhere-else\nVersion: 1.0\n",
        f"{info}/WHEEL": b"Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }

    def digest(data: bytes) -> str:
        return base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()

    record = "".join(f"{path},sha256={digest(data)},{len(data)}\n" for path, data in files.items())
    wheel = tmp_path / f"{name}-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for path, data in {**files, f"{info}/RECORD": f"{record}{info}/RECORD,,\n".encode()}.items():
            archive.writestr(path, data)
    sha256 = hashlib.sha256(wheel.read_bytes()).hexdigest()
    (tmp_path / "lock.txt").write_text(f"durable-llm-nowhere-else==1.0 --hash=sha256:{sha256}\n")
    return tmp_path


def test_uv_finds_what_pip_is_configured_to_find(index: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    configuration = index / "pip.conf"
    configuration.write_text(f"[global]\nfind-links = {index}\nno-index = true\n[install]\ntimeout = 7\n")
    for name in [name for name in os.environ if name.startswith(("PIP_", "UV_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", str(configuration))
    monkeypatch.setenv("PIP_CERT", "/a/certificate")
    found, options = uv_settings(pip_settings()), uv_options(pip_settings())
    assert found.pop("SSL_CERT_FILE") == "/a/certificate"
    assert (found["UV_FIND_LINKS"], found["UV_HTTP_TIMEOUT"]) == (str(index), "7")
    assert options == ("--no-index",)
    command = (Path(sys.executable).with_name("uv"), "pip", "install", "--target", index / "there", "--no-deps")
    arguments = ("--require-hashes", *options, "-r", index / "lock.txt")
    subprocess.run((*command, *arguments), check=True, env={**os.environ, **found})
    assert (index / "there" / "durable_llm_nowhere_else.py").exists()


def test_every_index_of_pips_is_one_of_uvs() -> None:
    found = uv_settings({"index-url": "https://a/simple", "extra-index-url": "https://b/simple\nhttps://c/simple"})
    assert found["UV_DEFAULT_INDEX"] == "https://a/simple"
    assert found["UV_INDEX"] == "https://b/simple https://c/simple"
    assert found["UV_INDEX_STRATEGY"] == "unsafe-best-match", "as pip, which relies on the hashes"
    assert "UV_DEFAULT_INDEX" not in uv_settings({})


@pytest.mark.timeout(300)
def test_pip_takes_over_where_uv_fails(index: Path) -> None:
    """A new environment without an index cannot install uv itself."""
    subprocess.run((sys.executable, "-m", "venv", index / "venv"), check=True)
    python = index / "venv" / "bin" / "python"
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PIP_", "UV_"))}
    environment |= {"PIP_CONFIG_FILE": os.devnull, "PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(index)}
    command = (python, ROOT / "deploy" / "install.py", index / "lock.txt")
    ended = subprocess.run(command, check=False, env=environment, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    assert "[1/1] durable-llm-nowhere-else" in ended.stdout
    assert "pip tries" in ended.stderr
    subprocess.run((python, "-c", "import durable_llm_nowhere_else"), check=True)
