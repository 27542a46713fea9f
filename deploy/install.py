"""Installs locks of requirements/ into the environment of the interpreter that runs it: the work of `make env`.

    .venv/bin/python deploy/install.py requirements/run.txt requirements/torch.txt

uv installs a lock with hashes, in a fraction of pip's time. pip installs it where uv fails, and installs every file
without hashes (torch.txt says why). Both take packages from the indexes in pip's configuration.

The script needs only the standard library, because it runs before anything is installed.
"""

import ast
import os
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Final

_ROOT: Final = Path(__file__).parents[1]
_UV_LOCK: Final = _ROOT / "requirements" / "uv.txt"
_PIP: Final = (sys.executable, "-m", "pip", "--disable-pip-version-check")
_SECTIONS: Final = ("global", "install", ":env:")
"""Sections of pip's configuration, each overriding those before it."""


def main(locks: list[Path]) -> int:
    """Install the locks one after another; return the exit status of the first that fails, else 0."""
    for number, lock in enumerate(locks, 1):
        text = lock.read_text()
        names = [line.partition("==")[0] for line in text.splitlines() if "==" in line and line[0].isalnum()]
        what = f"{len(names)} packages" if len(names) > 1 else names[0]
        print(f"[{number}/{len(locks)}] {what} of {_shown(lock)}", flush=True)
        since = time.monotonic()
        status = _install_locked(lock) if "--hash=" in text else _pip("-r", str(lock), "--no-warn-conflicts")
        if status:
            return status
        print(f"[{number}/{len(locks)}] done in {time.monotonic() - since:.0f} s", flush=True)
    return 0


def _install_locked(lock: Path) -> int:
    # A lock is complete, so nothing is resolved.
    arguments = ("--require-hashes", "--no-deps", "-r", str(lock))
    if _pip("-qq", "--require-hashes", "--no-deps", "-r", str(_UV_LOCK)) == 0:
        uv = Path(sys.executable).with_name("uv")
        configured = pip_settings()
        command = (str(uv), "pip", "install", "--python", sys.executable, *uv_options(configured), *arguments)
        environment = {**uv_settings(configured), **os.environ}
        if subprocess.run(command, env=environment, check=False).returncode == 0:
            return 0
    print("uv could not install it. pip tries next, which takes longer.", file=sys.stderr, flush=True)
    return _pip("--no-warn-conflicts", *arguments)


def _pip(*arguments: str) -> int:
    return subprocess.run((*_PIP, "install", *arguments), check=False).returncode


def pip_settings() -> dict[str, str]:
    """Return pip's settings by name, including those from environment variables."""
    listed = subprocess.run((*_PIP, "config", "list"), check=True, capture_output=True, text=True).stdout
    found: dict[str, dict[str, str]] = {section: {} for section in _SECTIONS}
    for line in listed.splitlines():
        key, _, value = line.partition("=")
        section, _, name = key.partition(".")
        if section in found:
            found[section][name] = str(ast.literal_eval(value))
    return {name: value for section in _SECTIONS for name, value in found[section].items()}


def uv_settings(pip: Mapping[str, str]) -> dict[str, str]:
    """Translate pip's settings into environment variables of uv, which reads none of pip's own."""
    settings = {
        "UV_DEFAULT_INDEX": pip.get("index-url", ""),
        "UV_INDEX": " ".join(pip.get("extra-index-url", "").split()),
        "UV_FIND_LINKS": ",".join(pip.get("find-links", "").split()),
        "UV_INSECURE_HOST": " ".join(pip.get("trusted-host", "").split()),
        "UV_HTTP_TIMEOUT": pip.get("timeout", pip.get("default-timeout", "")),
        "SSL_CERT_FILE": pip.get("cert", ""),
        "SSL_CLIENT_CERT": pip.get("client-cert", ""),
        "ALL_PROXY": pip.get("proxy", ""),
        # Like pip, take a package from any index that has it. The hashes decide which file is right.
        "UV_INDEX_STRATEGY": "unsafe-best-match",
        # uv warns about a cache on another disk, which is normal here.
        "UV_LINK_MODE": "" if os.environ.get("UV_LINK_MODE") else "copy",
    }
    return {name: value for name, value in settings.items() if value}


def uv_options(pip: Mapping[str, str]) -> tuple[str, ...]:
    """Translate pip's settings for which uv has no environment variable into options."""
    return ("--no-index",) if pip.get("no-index", "").lower() in ("1", "true", "yes", "on") else ()


def _shown(path: Path) -> str:
    return str(path.relative_to(_ROOT)) if path.is_relative_to(_ROOT) else str(path)


if __name__ == "__main__":
    sys.exit(main([Path(argument).absolute() for argument in sys.argv[1:]]))
