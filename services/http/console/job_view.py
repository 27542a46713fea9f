"""The values on the page of a job."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final
from urllib.parse import quote

from google.rpc import error_details_pb2, status_pb2

from durable_llm._prices import amount
from jobs.errors import BY_REASON
from jobs.stages import waits_for_seat
from llm_pb import llm_pb2
from services.http.console.formats import between, duration, number, words_of
from services.http.settings import HttpSettings

FINAL: Final = frozenset(
    {
        llm_pb2.JOB_STATE_SUCCEEDED,
        llm_pb2.JOB_STATE_FAILED,
        llm_pb2.JOB_STATE_CANCELLED,
        llm_pb2.JOB_STATE_TIMED_OUT,
    }
)
"""The states in which nothing happens any more."""
_SETTLED: Final = FINAL | {llm_pb2.JOB_STATE_NOTIFYING}


@dataclass(frozen=True)
class Problem:
    """An error, for people."""

    message: str
    reason: str
    """Its name in docs/errors.md. May be empty."""
    meaning: str
    """What the reason means. May be empty."""


@dataclass(frozen=True)
class Attempt:
    """A step of the timeline."""

    attempt: llm_pb2.JobAttempt
    end: str
    """How it ended, in words; empty while it runs."""
    problem: Problem | None


def problem_of(error: status_pb2.Status) -> Problem:
    """Return an error of a job, an attempt or a delivery."""
    info = error_details_pb2.ErrorInfo()
    for detail in error.details:
        if detail.Is(info.DESCRIPTOR):
            detail.Unpack(info)
    kind = BY_REASON.get(info.reason)
    return Problem(error.message, info.reason, (kind.__doc__ or "") if kind is not None else "")


def _step(attempt: llm_pb2.JobAttempt) -> Attempt:
    return Attempt(
        attempt,
        words_of(llm_pb2.AttemptEnd, attempt.end, "ATTEMPT_END_").replace("Unspecified", "Unknown"),
        problem_of(attempt.error) if attempt.HasField("error") else None,
    )


class JobView:
    """A job, for the template of its page."""

    def __init__(self, answer: llm_pb2.GetJobResponse, settings: HttpSettings) -> None:
        self.request = answer.job
        self.status = answer.status
        self.result = answer.result
        self._attempts = answer.attempts
        self.final = answer.status.state in FINAL
        self.settled = answer.status.state in _SETTLED
        """Whether the outcome is settled, so that a cancel changes nothing."""
        self.problem = problem_of(answer.status.error) if answer.status.HasField("error") else None
        self.trace_url = _url(settings.console_trace_url, trace_id=answer.status.trace_id)
        self.temporal_url = _url(
            settings.console_temporal_url, workflow_id=answer.status.workflow_id, run_id=answer.status.run_id
        )

    @property
    def attempts(self) -> Sequence[Attempt]:
        """The attempts, oldest first. An attempt of an open job that no heartbeat has reported may be missing."""
        if self.result.attempts or self.settled or not self.status.attempt:
            return list(map(_step, self.result.attempts))
        status = self.status
        if self._attempts:
            steps = list(map(_step, self._attempts))
            last = self._attempts[-1]
            if last.end == llm_pb2.ATTEMPT_END_UNSPECIFIED:
                steps[-1] = Attempt(last, "Paused" if waits_for_seat(status.progress) else "", None)
            return steps
        running = llm_pb2.JobAttempt(
            attempt=status.attempt, worker=status.progress.worker, start_time=status.start_time
        )
        end = ""
        if status.state == llm_pb2.JOB_STATE_QUEUED:
            end = "Paused" if waits_for_seat(status.progress) else "Ended"
        return [Attempt(running, end, None)]

    @property
    def facts(self) -> Sequence[tuple[str, str, str]]:
        """The numbers of the job: a key, a name and a value."""
        status, metadata, progress = self.status, self.result.metadata, self.status.progress
        tokens = metadata.output_tokens or progress.output_tokens
        facts = [("tokens", "Tokens", number(tokens)), ("rate", "Tokens/s", self._rate(tokens))]
        if metadata.prompt_tokens:
            facts.append(("prompt", "Prompt tokens", number(metadata.prompt_tokens)))
        if metadata.HasField("cost_micros"):
            facts.append(("cost", "Cost", amount(metadata.cost_micros)))
        first = between(status.create_time, status.first_token_time) if status.HasField("first_token_time") else "–"
        facts.append(("first", "Time to first token", first))
        facts.append(("waited", "Waited", self._waited()))
        taken = between(status.create_time, status.end_time) if status.HasField("end_time") else ""
        facts.append(("duration", "Duration", taken))
        return facts

    def _waited(self) -> str:
        """Return the time from Submit to the first attempt."""
        if self.result.metadata.HasField("queue_time"):
            return duration(self.result.metadata.queue_time)
        if self.result.attempts:
            return between(self.status.create_time, self.result.attempts[0].start_time)
        if self.status.HasField("start_time") and self.status.attempt == 1:
            return between(self.status.create_time, self.status.start_time)
        return "–"

    def _rate(self, tokens: int) -> str:
        """Return the tokens a second from the first token to the last."""
        metadata, status = self.result.metadata, self.status
        if metadata.HasField("latency") and metadata.HasField("time_to_first_token"):
            seconds = (metadata.latency.ToTimedelta() - metadata.time_to_first_token.ToTimedelta()).total_seconds()
        elif status.HasField("first_token_time") and status.progress.HasField("updated_at"):
            seconds = (status.progress.updated_at.ToDatetime() - status.first_token_time.ToDatetime()).total_seconds()
        else:
            return "–"
        return f"{(tokens - 1) / seconds:.1f}" if seconds > 0 and tokens > 1 else "–"


def _url(template: str, **values: str) -> str:
    """Return a link; empty where there is no template, or nothing to put into it."""
    if not all(value for name, value in values.items() if f"{{{name}}}" in template):
        return ""
    for name, value in values.items():
        template = template.replace(f"{{{name}}}", quote(value, safe=""))
    return template
