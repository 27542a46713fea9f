"""Sizes that keep a job within Temporal's limits: 2 MiB a payload, 4 MB a gRPC message, 255 characters an id."""

from typing import Final

from payload_converter import MAX_PAYLOAD_BYTES

_OVERHEAD: Final = 64 * 1024
"""Room for ids, times, errors and the payload's own metadata around a large text."""

MAX_JOB_BYTES: Final = MAX_PAYLOAD_BYTES - _OVERHEAD
"""Largest JobRequest."""

MAX_RESULT_BYTES: Final = MAX_PAYLOAD_BYTES - _OVERHEAD
"""Largest JobResult."""

MAX_OUTPUT_BYTES: Final = MAX_RESULT_BYTES - 4096
"""Output and logprobs that fit a result beside its metadata."""

MAX_NOTIFY_RESULT_BYTES: Final = 256 * 1024
"""Largest JobResult that NotifyUI is given whole: a job's deliveries are scheduled in one message."""

MAX_TEMPORAL_ID: Final = 255
"""Maximum length of a workflow id, and of a task queue's name, in characters: what Temporal stores on PostgreSQL."""
