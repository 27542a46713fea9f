"""Sizes that keep a job within Temporal's limits: 2 MiB a payload, 4 MB a gRPC message."""

from typing import Final

from payload_converter import MAX_PAYLOAD_BYTES

_OVERHEAD: Final = 64 * 1024
"""Bytes reserved for ids, times, errors and the payload's own metadata around a large text."""

MAX_JOB_BYTES: Final = MAX_PAYLOAD_BYTES - _OVERHEAD
"""Maximum size of a JobRequest."""

MAX_RESULT_BYTES: Final = MAX_PAYLOAD_BYTES - _OVERHEAD
"""Maximum size of a JobResult."""

MAX_OUTPUT_BYTES: Final = MAX_RESULT_BYTES - 32 * 1024
"""Maximum size of output and logprobs, which share a result with its metadata and its attempts."""

MAX_INLINE_BYTES: Final = 1024 * 1024
"""Maximum size of output and logprobs that a result holds where the output may be a file instead."""

MAX_STEP_INLINE_BYTES: Final = 64 * 1024
"""The same for the step of a pipeline: its result lands in the history of the pipeline, too, which has 50 MiB."""

DEFAULT_MAX_OUTPUT_BYTES: Final = 50_000_000
"""Maximum size of output and logprobs where the output may be a file."""

MAX_PROMPT_FILE_BYTES: Final = 64 * 1024 * 1024
"""Maximum size of a prompt that is a file, where the context does not bound it. A worker reads it as a whole."""

MAX_NOTIFY_RESULT_BYTES: Final = 256 * 1024
"""Maximum size of a JobResult that NotifyUI receives whole. All deliveries of a job are scheduled in one message."""
