"""Settings of the command line: flags, then the environment, then a profile of a file, then defaults."""

import json
import os
import tempfile
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

from durable_llm.cli._exits import CommandError
from durable_llm.cli._text import say

SETTINGS: Final = {
    "address": "host:port of the gateway",
    "api_key": "API key or JWT",
    "api_key_file": "file that holds the API key or JWT",
    "tls": "true or false: whether to use TLS",
    "tls_ca": "file with the CAs to trust, in PEM",
    "tls_cert": "file with the client certificate, in PEM",
    "tls_key": "file with the client certificate's key, in PEM",
    "user": "user_id of submitted jobs",
    "project": "project_id of submitted jobs",
    "model": "model of submitted jobs",
}
"""The settings of a profile, each with its meaning. The environment has them as DURABLE_LLM_ADDRESS and so on."""
PREFIX: Final = "DURABLE_LLM_"
DEFAULT_PROFILE: Final = "default"
_CREDENTIAL: Final = ("api_key", "api_key_file")
_TEXTS: Final = ("address", "user", "project", "model")
"""The settings that a request or an address holds. The name of a file need not be in UTF-8."""
_TABLE: Final = "profile"
_CURRENT: Final = "current"
_OTHERS_MAY_READ: Final = 0o044


def config_path() -> Path:
    """Return the path of the file of profiles: DURABLE_LLM_CONFIG, or durable-llm/config.toml of the XDG folder."""
    if named := os.environ.get(f"{PREFIX}CONFIG"):
        return Path(named)
    folder = os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config"
    return Path(folder) / "durable-llm" / "config.toml"


class Profiles:
    """The file of profiles."""

    def __init__(self, path: Path) -> None:
        """Read the file, which need not exist. Raises CommandError for a file that is wrong."""
        self.path = path
        self.named: dict[str, dict[str, str]] = {}
        self.current = ""
        """The profile that `config use` has chosen. Empty: none."""
        try:
            content = tomllib.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return
        except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
            raise CommandError(f"{path} cannot be read: {error}") from error
        self._take(content)
        if any("api_key" in profile for profile in self.named.values()):
            warn_if_others_may_read(path)

    def _take(self, content: Mapping[str, Any]) -> None:
        tables = content.get(_TABLE, {})
        unknown = [str(key) for key in content if key not in (_TABLE, _CURRENT)]
        if unknown or not isinstance(tables, dict) or not all(isinstance(table, dict) for table in tables.values()):
            wrong = f"unknown: {', '.join(unknown)}" if unknown else f"{_TABLE} is no table"
            raise CommandError(f"{self.path}: {wrong}; a profile is a table [{_TABLE}.NAME]")
        self.current = str(content.get(_CURRENT, ""))
        for name, table in tables.items():
            self.named[name] = {}
            for key, value in table.items():
                if key not in SETTINGS:
                    raise CommandError(f"{self.path}: profile {name} has no setting {key}: {', '.join(SETTINGS)}")
                self.named[name][key] = str(value).lower() if isinstance(value, bool) else str(value)

    def chosen(self, flag: str = "") -> str:
        """Return the name of the profile to use. Raises CommandError for one that does not exist."""
        name = flag or os.environ.get(f"{PREFIX}PROFILE") or self.current
        if name and name not in self.named:
            known = ", ".join(self.named) or "none"
            raise CommandError(f"{self.path} has no profile {name}; it has: {known}")
        return name or DEFAULT_PROFILE

    def write(self) -> None:
        """Replace the file by one that only its owner may read."""
        lines = [f"{_CURRENT} = {_quoted(self.current)}", ""] if self.current else []
        for name, profile in self.named.items():
            lines += [
                f"[{_TABLE}.{_quoted(name)}]",
                *(f"{key} = {_value(key, text)}" for key, text in profile.items()),
                "",
            ]
        self.path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        # A link stays a link. The name of a temporary file does not collide, and its mode is 0600.
        target = self.path.resolve()
        handle, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}-")
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                file.write("\n".join(lines))
            os.replace(name, target)
        except BaseException:
            os.unlink(name)
            raise


def settings_of(flags: Mapping[str, str | None], profile: Mapping[str, str]) -> dict[str, str]:
    """Return the settings in force: a flag overrides the environment, which overrides the profile.

    A credential of one of the three hides both settings of a credential of those behind it. An empty variable of the
    environment counts as unset.
    """
    in_force: dict[str, str] = {}
    for layer in (flags, dict(_environment()), profile):
        has_credential = any(key in in_force for key in _CREDENTIAL)
        for key in SETTINGS:
            value = layer.get(key)
            if value and key not in in_force and not (has_credential and key in _CREDENTIAL):
                in_force[key] = value
    if in_force.get("tls", "true") not in ("true", "false"):
        raise CommandError(f"tls must be true or false, not {in_force['tls']!r}")
    return in_force


def _environment() -> Iterator[tuple[str, str]]:
    for key in SETTINGS:
        if value := os.environ.get(PREFIX + key.upper()):
            yield key, _in_utf_8(PREFIX + key.upper(), value) if key in _TEXTS else value
    # The library's own variable.
    if not os.environ.get(f"{PREFIX}ADDRESS") and (address := os.environ.get("LLM_ADDRESS")):
        yield "address", _in_utf_8("LLM_ADDRESS", address)


def _in_utf_8(name: str, value: str) -> str:
    try:
        return os.fsencode(value).decode()
    except UnicodeDecodeError:
        raise CommandError(f"{name} is not in UTF-8") from None


def warn_if_others_may_read(path: Path) -> None:
    """Warn of a file with a key that others than its owner may read."""
    mode = path.stat().st_mode
    if mode & _OTHERS_MAY_READ:
        say(f"durable-llm: warning: others can read {path}, which holds a key: chmod 600 {path}")


def _quoted(text: str) -> str:
    # What JSON escapes, TOML escapes in the same way. `config set` refuses control characters.
    return json.dumps(text, ensure_ascii=False)


def _value(key: str, text: str) -> str:
    return text if key == "tls" and text in ("true", "false") else _quoted(text)
