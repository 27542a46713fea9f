"""Errors of batches. They belong to the tree of durable_llm.errors.

ApiError
└── BatchNotFound  no batch has this id, or it is past its retention
"""

from collections.abc import Mapping
from typing import Final

from durable_llm.errors import ApiError


class BatchNotFound(ApiError):
    """No batch has this id, or it is past its retention."""

    reason = "BATCH_NOT_FOUND"


BATCH_ERRORS: Final[Mapping[str, type[ApiError]]] = {BatchNotFound.reason: BatchNotFound}
"""The class for each reason."""
