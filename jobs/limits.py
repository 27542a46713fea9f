"""Sizes that keep a job within Temporal's limits: 2 MiB a payload, 4 MB a gRPC message."""

from typing import Final

_OVERHEAD: Final = 64 * 1024
"""Room for ids, times, errors and the payload's own metadata around a large text."""

MAX_PAYLOAD_BYTES: Final = 2 * 1024 * 1024
"""Temporal refuses a larger payload; a larger activity result it would retry for ever."""

MAX_JOB_BYTES: Final = MAX_PAYLOAD_BYTES - _OVERHEAD
"""Largest JobRequest."""

MAX_RESULT_BYTES: Final = MAX_PAYLOAD_BYTES - _OVERHEAD
"""Largest JobResult."""

MAX_OUTPUT_BYTES: Final = MAX_RESULT_BYTES - 4096
"""Output and logprobs that fit a result beside its metadata."""

MAX_NOTIFY_RESULT_BYTES: Final = 256 * 1024
"""Largest JobResult that NotifyUI is given whole: a job's deliveries are scheduled in one message."""

DEFAULT_PRIORITY: Final = 3
"""Of 1 (first) to 5 (last): a job's that does not say, and the first that an operator has to allow."""
