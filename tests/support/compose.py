"""Reads deploy/compose as Docker Compose does, without Docker."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import yaml

from tests.support.paths import ROOT

FOLDER: Final = ROOT / "deploy" / "compose"
_VARIABLE: Final = re.compile(r"\$\$|\$\{(\w+)(?::-([^}]*)|:\?[^}]*)?\}")


def load(name: str = "compose.yaml", environment: Mapping[str, str] | None = None) -> dict[str, Any]:
    """Return a Compose file with its variables replaced: by the environment, or else by their defaults."""

    def value(found: re.Match[str]) -> str:
        return "$" if found[0] == "$$" else (environment or {}).get(found[1], found[2] or "")

    def replaced(part: Any) -> Any:
        if isinstance(part, dict):
            return {key: replaced(inner) for key, inner in part.items()}
        if isinstance(part, list):
            return [replaced(inner) for inner in part]
        return _VARIABLE.sub(value, part) if isinstance(part, str) else part

    loaded: dict[str, Any] = replaced(yaml.safe_load((FOLDER / name).read_text()))
    return loaded


def with_override(base: Mapping[str, Any], override: Mapping[str, Any]) -> dict[str, Any]:
    """Return a Compose file with an override, as `-f compose.yaml -f override.yaml`. Lists are joined."""
    both = dict(base)
    for key, value in override.items():
        match both.get(key), value:
            case dict() as before, dict():
                both[key] = with_override(before, value)
            case list() as before, list():
                both[key] = [*before, *(one for one in value if one not in before)]
            case _:
                both[key] = value
    return both


def mounted(compose: Mapping[str, Any], service: Mapping[str, Any], volumes: Path, secrets: Path) -> dict[str, Path]:
    """Return the files that a container has, each with the file of this machine: secrets, volumes and what they hold.

    `volumes` has a folder for each volume, `secrets` what `make secrets` has made.
    """
    files = {
        f"/run/secrets/{name}": secrets / Path(compose["secrets"][name]["file"]).name
        for name in service.get("secrets", ())
    }
    for volume in service.get("volumes", ()):
        source, target, *_ = volume.split(":")
        folder = (FOLDER / source).resolve() if source.startswith(".") else volumes / source
        found = [folder] if folder.is_file() else [path for path in folder.rglob("*") if path.is_file()]
        files |= {target: folder}
        files |= {f"{target}/{path.relative_to(folder)}".removesuffix("/."): path for path in found}
    return files
