"""A training between its pipeline, the trainers and those who load its model: errors, and names of trained models."""

import re
from typing import Final

from llm_pb import internal_pb2

MODEL_NAME_PATTERN: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
"""The form of the name of a trained model."""
ALIAS_PATTERN: Final = re.compile(r"[A-Za-z][A-Za-z0-9._-]{0,63}")
"""The form of an alias. It begins with a letter, so that it is no version."""
LATEST: Final = "latest"
"""The alias of the newest version."""

MAX_STEPS: Final = 1_000_000
MAX_CHECKPOINT_STEPS: Final = 100_000
MAX_STEP_TOKENS: Final = 1_048_576
MAX_IMPROVEMENT: Final = 100.0
DEFAULT_CHECKPOINT_STEPS: Final = 50
DEFAULT_LEARNING_RATE: Final = 5e-4
DEFAULT_STEP_TOKENS: Final = 2048

UNKNOWN_BASE_MODEL: Final = "UNKNOWN_BASE_MODEL"
INVALID_DATASET: Final = "INVALID_DATASET"
LEAKED_DATASET: Final = "LEAKED_DATASET"
DATASET_MISSING: Final = "DATASET_MISSING"
LIMIT_EXCEEDED: Final = "LIMIT_EXCEEDED"
TRAINING_DIVERGED: Final = "TRAINING_DIVERGED"
TRAINING_FAILED: Final = "TRAINING_FAILED"
OUT_OF_MEMORY: Final = "OUT_OF_MEMORY"
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
