"""The environment variables of the settings: their files, their earlier names, and those that are misspelt.

A misspelt setting would silently have no effect.
"""

import difflib
import re
from collections.abc import Collection, Iterable, MutableMapping
from pathlib import Path
from typing import Final, NamedTuple

from pydantic import ValidationError
from pydantic_core import ErrorDetails
from pydantic_settings import BaseSettings
from pydantic_settings.exceptions import SettingsError

_SHARED_PREFIXES: Final = ("HTTP_", "LOG_", "TEMPORAL_")
"""Prefixes that other programs' variables have, too."""
_SERVICE_LINK: Final = re.compile(r".*_(SERVICE_HOST|SERVICE_PORT(_.+)?|PORT_\d+_(TCP|UDP|SCTP)(_.+)?)")
"""Variables that Kubernetes sets for each Service. A Service may have the name of one of ours."""
_FILE: Final = "_FILE"
"""Suffix of the variable that names the file of a setting's value."""
_SIMILAR: Final = 0.6
_ALMOST_EQUAL: Final = 0.9


class WrongSetting(ValueError):
    """A variable has a value that cannot be used. The message begins with its name, and holds no secret."""


class Unknown(NamedTuple):
    """A variable that looks like a setting and is none."""

    name: str
    meant: str | None
    """The setting with the most similar name. None when no name is similar: it may be another program's variable."""

    def __str__(self) -> str:
        """Return a message for people. It never holds the value, which may be a secret."""
        return f"{self.name} is no setting" + (f": do you mean {self.meant}?" if self.meant else "")


def setting_names(settings: Collection[type[BaseSettings]]) -> list[str]:
    """Return the names of the variables of the settings."""
    return [
        f"{kind.model_config.get('env_prefix', '')}{field.upper()}" for kind in settings for field in kind.model_fields
    ]


def read_variable_files(environment: MutableMapping[str, str], settings: Collection[type[BaseSettings]]) -> None:
    """Set each variable X of the settings that has an X_FILE to the content of that file, and remove X_FILE.

    A secret need not be in the environment of a container then, where everybody who may inspect it reads it. A newline
    at the file's end is no part of the value. Raises WrongSetting for a file that cannot be read, and where both
    variables are set.
    """
    known = set(setting_names(settings))
    for name in known:
        variable = f"{name}{_FILE}"
        if variable in known or variable not in environment:
            continue
        if name in environment:
            raise WrongSetting(f"{name} and {variable} are both set")
        try:
            text = Path(environment[variable]).read_text()
        except (OSError, UnicodeDecodeError) as error:
            raise WrongSetting(f"{variable}: {error}") from error
        environment[name] = text.removesuffix("\n")
        del environment[variable]


def unknown_variables(names: Iterable[str], settings: Collection[type[BaseSettings]]) -> list[Unknown]:
    """Return the names that look like a setting and are none, in their order."""
    prefixes = [str(kind.model_config.get("env_prefix", "")) for kind in settings]
    known = setting_names(settings)
    own = [prefix for prefix in prefixes if prefix not in _SHARED_PREFIXES]
    unknown = []
    for name in names:
        # pydantic-settings ignores the case of names.
        upper = name.upper()
        if upper in known or upper.removesuffix(_FILE) in known or _SERVICE_LINK.fullmatch(upper):
            continue
        prefix = next((prefix for prefix in own if upper.startswith(prefix)), "")
        rest = [setting.removeprefix(prefix) for setting in known if setting.startswith(prefix)]
        cutoff = _SIMILAR if prefix else _ALMOST_EQUAL
        similar = difflib.get_close_matches(upper.removeprefix(prefix), rest, n=1, cutoff=cutoff)
        if prefix or similar:
            unknown.append(Unknown(name, prefix + similar[0] if similar else None))
    return unknown


def rename_variables(environment: MutableMapping[str, str], settings: Collection[type[BaseSettings]]) -> list[str]:
    """Rename variables that still have their name of the release before; return a warning for each.

    A settings class lists them in `RENAMED`. Where both names are set, the new one counts.
    """
    warnings = []
    for kind in settings:
        prefix = str(kind.model_config.get("env_prefix", ""))
        for earlier, present in getattr(kind, "RENAMED", {}).items():
            old, new = f"{prefix}{earlier.upper()}", f"{prefix}{present.upper()}"
            if old in environment:
                environment.setdefault(new, environment.pop(old))
                warnings.append(f"{old} is called {new} now; the next release does not know the old name")
    return warnings


def setting_problems(error: ValidationError | SettingsError, settings: Collection[type[BaseSettings]]) -> list[str]:
    """Return what is wrong with the settings, a line for each variable. No line holds a value: it may be a secret."""
    prefixes = {kind.__name__: str(kind.model_config.get("env_prefix", "")) for kind in settings}
    if isinstance(error, ValidationError):
        prefix = prefixes.get(error.title, "")
        return [
            f"{_variable(prefix, problem['loc']) or error.title}: {_message(problem)}"
            for problem in error.errors(include_url=False, include_input=False)
        ]
    # The error names only the field. Its cause has the reason.
    field = re.search(r'field "(\w+)"', str(error))
    names = [
        f"{prefixes[kind.__name__]}{field[1].upper()}"
        for kind in settings
        if field is not None and field[1] in kind.model_fields
    ]
    return [f"{' or '.join(names) or error}: is no JSON: {error.__cause__}"]


def _message(problem: ErrorDetails) -> str:
    """Return the message of pydantic, or a clearer one where it speaks of Python and not of a variable."""
    match problem:
        case {"type": "model_type" | "dict_type"}:
            return "is no JSON object"
        case {"type": "tuple_type"}:
            return "is no JSON list"
        case {"type": "too_short", "ctx": {"field_type": "Value", "min_length": least}}:
            # A secret, whose characters pydantic takes for items.
            return f"must have at least {least} character{'s' if least > 1 else ''}"
        case {"type": "too_short", "ctx": {"min_length": least}}:
            return f"must have at least {least} item{'s' if least > 1 else ''}"
        case {"type": "time_delta_parsing"}:
            return "must be a duration such as PT30S"
        case {"type": "bool_parsing"}:
            return "must be true or false"
        case {"type": "int_parsing" | "int_type"}:
            return "must be a whole number"
        case {"type": "string_type"}:
            return "must be text"
        case {"type": "float_parsing"}:
            return "must be a number"
        case {"type": "missing"}:
            return "is missing"
        case {"type": "extra_forbidden"}:
            return "is not known"
        case {"type": "path_not_directory"}:
            return "is no folder"
    return re.sub(r"^(Input|String) should ", "must ", problem["msg"].removeprefix("Value error, "))


def _variable(prefix: str, place: tuple[int | str, ...]) -> str:
    field, *inner = (str(part) for part in place) if place else ("",)
    return ".".join([f"{prefix}{field.upper()}", *inner]) if field else ""
