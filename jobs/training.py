"""A training between its pipeline, the trainers and those who load its model: errors, and names of trained models."""

import re
from typing import Final

from llm_pb import internal_pb2, llm_pb2

MODEL_NAME_PATTERN: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
"""The form of the name of a trained model."""
ALIAS_PATTERN: Final = re.compile(r"[A-Za-z][A-Za-z0-9._-]{0,63}")
"""The form of an alias. It begins with a letter, so that it is no version."""
LATEST: Final = "latest"
"""The alias of the newest version."""

MAX_MODELS: Final = 100
MAX_VERSIONS: Final = 20
MAX_ALIASES: Final = 10
"""Maximum number of aliases of a model. It is smaller than MAX_VERSIONS, so that some version can always go."""
MAX_REGISTRY_BYTES: Final = 1024 * 1024
"""Maximum size of the registry. Temporal takes no input of a run and no answer to a query of more than 2 MiB."""
_VERSION_BYTES: Final = 1024
"""Size of a version in the registry, about."""

MAX_STEPS: Final = 1_000_000
MAX_CHECKPOINT_STEPS: Final = 100_000
MAX_STEP_TOKENS: Final = 1_048_576
MAX_IMPROVEMENT: Final = 100.0
DEFAULT_CHECKPOINT_STEPS: Final = 50
DEFAULT_LEARNING_RATE: Final = 5e-4
DEFAULT_STEP_TOKENS: Final = 2048
MAX_LORA_RANK: Final = 512
MAX_LORA_ALPHA: Final = 1024.0
DEFAULT_LORA_ALPHA: Final = 2.0
"""The default alpha of an adapter, as a multiple of its rank."""
MAX_LORA_MODULES: Final = 32
LORA_MODULE_PATTERN: Final = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.]{0,127}")
"""The form of the name of a module of a model."""

UNKNOWN_BASE_MODEL: Final = "UNKNOWN_BASE_MODEL"
INVALID_DATASET: Final = "INVALID_DATASET"
LEAKED_DATASET: Final = "LEAKED_DATASET"
DATASET_MISSING: Final = "DATASET_MISSING"
LIMIT_EXCEEDED: Final = "LIMIT_EXCEEDED"
TRAINING_DIVERGED: Final = "TRAINING_DIVERGED"
TRAINING_FAILED: Final = "TRAINING_FAILED"
OUT_OF_MEMORY: Final = "OUT_OF_MEMORY"
GPU_LOST: Final = "GPU_LOST"
OUT_OF_SPACE: Final = "OUT_OF_SPACE"
STORE_UNAVAILABLE: Final = "STORE_UNAVAILABLE"
HANDED_OVER: Final = "HANDED_OVER"
OBJECT_MISSING: Final = "OBJECT_MISSING"


def trained_model(model: str) -> tuple[str, str] | None:
    """Return name and version of "<model>@<version>", or name and alias; None for a model that was not trained here."""
    name, at, which = model.partition("@")
    return (name, which) if at else None


def find_version(registry: internal_pb2.ModelRegistry, name: str, which: str) -> internal_pb2.RegisteredVersion | None:
    """Return the version of a trained model by its number or an alias; None without one."""
    for model in registry.models:
        if model.name == name:
            number = int(which) if which.isascii() and which.isdigit() and len(which) < 10 else model.aliases.get(which)
            return next((one for one in model.versions if one.version.version == number), None)
    return None


def find_model(registry: internal_pb2.ModelRegistry, name: str) -> internal_pb2.RegisteredModel | None:
    """Return a model of the registry; None without one. It may have no version any more."""
    return next((model for model in registry.models if model.name == name), None)


def why_no_room(registry: internal_pb2.ModelRegistry, name: str, alias: str, size: int = _VERSION_BYTES) -> str:
    """Return why a new version cannot be registered; empty if it can. `size` is that of what is added, in bytes."""
    model = find_model(registry, name)
    if (model is None or not model.versions) and sum(bool(one.versions) for one in registry.models) >= MAX_MODELS:
        return f"a tenant has at most {MAX_MODELS} models"
    grows = model is None or len(model.versions) < MAX_VERSIONS
    if grows and registry.ByteSize() + size > MAX_REGISTRY_BYTES:
        return "the models of the tenant have too many versions"
    if model is not None and len({*model.aliases, LATEST, alias} - {""}) > MAX_ALIASES:
        return f"a model has at most {MAX_ALIASES} aliases"
    return ""


def shown_model(model: internal_pb2.RegisteredModel) -> llm_pb2.TrainedModel:
    """Return a model as clients get it."""
    return llm_pb2.TrainedModel(
        name=model.name, versions=[one.version for one in reversed(model.versions)], aliases=model.aliases
    )
