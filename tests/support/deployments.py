"""Checks what a container of the suite is given, in Compose or Kubernetes, without starting it.

Its variables have to be settings of its service, with values that the service takes; its ports those that it listens
on; its probes paths that it answers.
"""

import os
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

from pydantic import ValidationError
from pydantic_settings import BaseSettings
from pydantic_settings.exceptions import SettingsError

from encryption import EncryptionSettings
from feed.feed import FeedSettings
from runtime.environment import read_variable_files, setting_names, setting_problems
from runtime.log import LogSettings
from runtime.temporal import TemporalSettings
from services.codec.settings import CodecSettings
from services.gateway.settings import GatewaySettings
from services.gpu_worker.settings import GpuWorkerSettings
from services.http.settings import HttpSettings
from services.notifier.settings import NotifierSettings
from services.trainer.settings import TrainerSettings
from store.settings import StoreSettings

_WORKER: Final = (FeedSettings, EncryptionSettings, StoreSettings, TemporalSettings, LogSettings)
SETTINGS: Final[Mapping[str, tuple[type[BaseSettings], ...]]] = {
    "gateway": (GatewaySettings, *_WORKER),
    "gpu_worker": (GpuWorkerSettings, *_WORKER),
    "trainer": (TrainerSettings, EncryptionSettings, StoreSettings, TemporalSettings, LogSettings),
    "notifier": (NotifierSettings, EncryptionSettings, TemporalSettings, LogSettings),
    "codec": (CodecSettings, EncryptionSettings, LogSettings),
    "http": (HttpSettings, LogSettings),
}
"""The classes that each service reads, by the name of its package. The service's own class is the first."""
TEMPORAL: Final = frozenset(
    f"TEMPORAL_{name}"
    for name in (
        *("ADDRESS", "NAMESPACE", "API_KEY", "CONFIG_FILE", "PROFILE", "TLS"),
        *("TLS_SERVER_NAME", "TLS_DISABLE_HOST_VERIFICATION"),
        *(
            f"TLS_{what}_{form}"
            for what in ("CLIENT_CERT", "CLIENT_KEY", "SERVER_CA_CERT")
            for form in ("PATH", "DATA")
        ),
    )
)
"""Variables of Temporal's own configuration."""
OF_OTHERS: Final = frozenset({"HF_HOME", "HF_TOKEN", "HOME", "PATH", "PYTHONDONTWRITEBYTECODE", "PYTHONUNBUFFERED"})
"""Variables of libraries and of Python."""
PROBES: Final = frozenset({"/healthz", "/readyz"})
"""What a service answers at the port of its metrics."""


def problems(service: str, environment: Mapping[str, str], files: Mapping[str, Path]) -> list[str]:
    """Return what is wrong with the variables of a container of a service.

    `environment` includes the variables of the image. `files` are the files in the container, each with a file of this
    machine that stands for it.
    """
    classes = SETTINGS[service]
    known = set(setting_names(classes))
    strangers = [
        f"{name} is no setting of {service}"
        for name in environment
        if name not in known | TEMPORAL | OF_OTHERS
        and name.removesuffix("_FILE") not in known
        and not name.startswith("OTEL_")
    ]
    # A path that no file stands for stays, and is refused by the settings that need the file.
    here = {name: str(files.get(value, value)) for name, value in environment.items()}
    lost = [
        f"{name}: {value} is not mounted"
        for name, value in environment.items()
        if value.startswith(("/run/", "/etc/")) and value not in files
    ]
    try:
        read_variable_files(here, classes)
    except ValueError as error:
        return [*strangers, *lost, str(error)]
    return [*strangers, *lost, *_refusals(classes, here)]


def ports(service: str, environment: Mapping[str, str]) -> dict[str, int]:
    """Return the ports that a service listens on: `metrics_port`, and `port` if it has one."""
    kind = SETTINGS[service][0]
    prefix = kind.model_config.get("env_prefix", "")
    own = {name: field for name, field in kind.model_fields.items() if name in ("port", "metrics_port")}
    return {name: int(environment.get(f"{prefix}{name.upper()}", field.default)) for name, field in own.items()}


def _refusals(classes: Collection[type[BaseSettings]], environment: Mapping[str, str]) -> Iterator[str]:
    with _as_environment(environment):
        for kind in classes:
            try:
                kind()
            except (ValidationError, SettingsError) as error:
                yield from setting_problems(error, classes)


@contextmanager
def _as_environment(environment: Mapping[str, str]) -> Iterator[None]:
    before = dict(os.environ)
    os.environ.clear()
    os.environ.update(environment)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def dockerfile(path: Path) -> dict[str, dict[str, Any]]:
    """Return the stages of a Dockerfile by name: what each instruction sets, with what it has from its base stage."""
    stages: dict[str, dict[str, Any]] = {}
    stage: dict[str, Any] = {}
    for line in path.read_text().replace("\\\n", " ").splitlines():
        word, _, rest = line.strip().partition(" ")
        match word:
            case "FROM":
                base, _, name = rest.partition(" AS ")
                inherited = stages.get(base, {"BASE": base, "ENV": {}, "EXPOSE": [], "LABEL": {}})
                stage = {key: value.copy() if hasattr(value, "copy") else value for key, value in inherited.items()}
                stages[name] = stage
            case "ENV" | "LABEL":
                stage[word] |= dict(part.split("=", 1) for part in rest.split() if "=" in part)
            case "EXPOSE":
                stage["EXPOSE"] = [int(port) for port in rest.split()]
            case "USER" | "WORKDIR" | "STOPSIGNAL" | "ENTRYPOINT" | "HEALTHCHECK":
                stage[word] = rest
    return stages
