"""Errors of trained models. They belong to the tree of durable_llm.errors.

ApiError
├── ModelNotFound       no trained model has this name or version
├── ModelVersionInUse   an alias names the version
└── TooManyModels       the tenant has as many models, or the model as many aliases, as there may be
"""

from collections.abc import Mapping
from typing import Final

from durable_llm.errors import ApiError


class ModelNotFound(ApiError):
    """No trained model has this name, or it has no such version."""

    reason = "MODEL_NOT_FOUND"


class ModelVersionInUse(ApiError):
    """An alias names the version: move the alias, or remove it."""

    reason = "MODEL_VERSION_IN_USE"


class TooManyModels(ApiError):
    """The tenant has as many trained models, or the model as many aliases, as there may be."""

    reason = "TOO_MANY_MODELS"


MODEL_ERRORS: Final[Mapping[str, type[ApiError]]] = {
    error.reason: error for error in (ModelNotFound, ModelVersionInUse, TooManyModels)
}
"""The class for each reason."""
