"""What the converter refuses, and what follows from it.

Two kinds of failure, told apart by whether another attempt can help:

    PayloadError   the value itself is wrong: not of the expected type, truncated, too big. It stays wrong for ever.
    RuntimeError   this process does not know the message type. One with newer code may.

Inside a workflow the SDK fails the workflow on the first and retries the workflow task on the second. So a workflow
started with bad input ends at once and says why, and one that met a newer type waits for the deployment to finish.
"""

from typing import Final

from temporalio.exceptions import ApplicationError

MAX_PAYLOAD_BYTES: Final = 2 * 1024 * 1024
"""Temporal's limit on the values of one call together, metadata and framing included (`limit.blobSize.error`)."""

PAYLOAD_ERROR_TYPE: Final = "PayloadValidationError"
"""The type of ApplicationError that the SDK reserves for values that cannot be converted."""


class PayloadError(ApplicationError):
    """A value that can never be converted. Not retryable; the message names the types and the cause."""

    def __init__(self, message: str) -> None:
        super().__init__(message, type=PAYLOAD_ERROR_TYPE, non_retryable=True)
