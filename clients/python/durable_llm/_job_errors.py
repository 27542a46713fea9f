"""The errors of jobs that ended without success, one class for each reason. durable_llm.errors has them."""

from collections.abc import Mapping
from typing import Any, Final

from durable_llm._details import reason_of
from durable_llm._enums import name_of
from durable_llm._error import DurableLLMError
from llm_pb import llm_pb2


class JobError(DurableLLMError):
    """A job ended without success."""

    def __init__(self, status: llm_pb2.JobStatus, result: llm_pb2.JobResult) -> None:
        super().__init__(status.error.message or name_of(llm_pb2.JobState, status.state))
        self.status = status
        """The job's final status."""
        self.result = result
        """What the job produced until its end. The output may be empty."""
        self.reason = reason_of(status.error) or self.reason

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.status, self.result), vars(self)


class InvalidJob(JobError):
    """The job breaks a rule of llm.proto."""

    reason = "INVALID_JOB"


class UnknownModel(JobError):
    """The worker that took the job does not serve its model."""

    reason = "UNKNOWN_MODEL"


class PromptTooLong(JobError):
    """The prompt leaves no room for a token in the model's context."""

    reason = "PROMPT_TOO_LONG"


class PromptFileMissing(JobError):
    """The file of the prompt was deleted or has expired before the job had read it."""

    reason = "PROMPT_FILE_MISSING"


class UnsupportedParams(JobError):
    """The engine does not support the sampling parameters."""

    reason = "UNSUPPORTED_PARAMS"


class ResultTooLarge(JobError):
    """The output exceeds the maximum size of a result."""

    reason = "RESULT_TOO_LARGE"


class BudgetSpent(JobError):
    """The job has used all that its budget allows, or its prompt alone would."""

    reason = "BUDGET_SPENT"


class EngineFailed(JobError):
    """The engine failed on this job in every attempt."""

    reason = "ENGINE_FAILED"


class OutOfMemory(JobError):
    """The device ran out of memory for this job in every attempt."""

    reason = "OUT_OF_MEMORY"


class EngineDead(JobError):
    """The engine died or hung in every attempt."""

    reason = "ENGINE_DEAD"


class WorkerShutdown(JobError):
    """Every worker that ran the job was stopped."""

    reason = "WORKER_SHUTDOWN"


class WorkerLost(JobError):
    """The workers that ran the job stopped sending heartbeats."""

    reason = "WORKER_LOST"


class QueueTimeout(JobError):
    """No worker took the job within its queue timeout."""

    reason = "QUEUE_TIMEOUT"


class RunTimeout(JobError):
    """Every attempt exceeded the job's run timeout."""

    reason = "RUN_TIMEOUT"


class TotalTimeout(JobError):
    """The job exceeded its total timeout."""

    reason = "TOTAL_TIMEOUT"


class Cancelled(JobError):
    """A client or an operator cancelled the job."""

    reason = "CANCELLED"


class Terminated(JobError):
    """An operator terminated the job's workflow."""

    reason = "TERMINATED"


JOB_ERRORS: Final[Mapping[str, type[JobError]]] = {kind.reason: kind for kind in JobError.__subclasses__()}
"""The class for each reason for which a job ends without success."""
