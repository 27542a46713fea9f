"""What pages show of a batch."""

from collections.abc import Sequence
from typing import Final

from google.rpc import error_details_pb2

from durable_llm._batch_stub import FINAL_BATCH_STATES
from durable_llm._enums import name_of
from durable_llm._prices import amount
from llm_pb import batch_pb2
from services.http.console.formats import batch_state, between, moment, number
from services.http.console.job_view import problem_of

_ENDS: Final = ("succeeded", "failed", "cancelled", "expired")


class BatchView:
    """A batch, for templates."""

    def __init__(self, status: batch_pb2.BatchStatus) -> None:
        self.status = status
        self.final = status.state in FINAL_BATCH_STATES
        self.state_name = name_of(batch_pb2.BatchState, status.state)
        self.words = batch_state(status.state)
        self.done = sum(getattr(status.counts, end) for end in _ENDS)
        """Number of lines that have ended."""
        self.problem = problem_of(status.error) if status.HasField("error") else None

    @property
    def bad_fields(self) -> Sequence[error_details_pb2.BadRequest.FieldViolation]:
        """The fields of bad lines that the batch's error names."""
        named = error_details_pb2.BadRequest()
        for detail in self.status.error.details:
            if detail.Is(named.DESCRIPTOR):
                detail.Unpack(named)
        return list(named.field_violations)

    @property
    def facts(self) -> Sequence[tuple[str, str]]:
        """The numbers of the batch: a name and a value."""
        status, counts = self.status, self.status.counts
        facts = [("Lines", number(counts.total))]
        facts += [(end.capitalize(), number(getattr(counts, end))) for end in _ENDS[:2]]
        if not self.final:
            facts += [
                ("Running", number(counts.running)),
                ("Waiting", number(counts.total - counts.running - self.done)),
            ]
        facts += [(end.capitalize(), number(count)) for end in _ENDS[2:] if (count := getattr(counts, end))]
        facts.append(("Output tokens", number(status.usage.output_tokens)))
        if not self.final:
            rate = f"{status.tokens_per_second:.1f}" if status.tokens_per_second else "–"
            facts.append(("Tokens/s", rate))
        if status.usage.HasField("cost_micros"):
            facts.append(("Cost", amount(status.usage.cost_micros)))
        if self.final:
            facts.append(("Duration", between(status.create_time, status.end_time)))
        else:
            expected = moment(status.estimated_end_time) if status.HasField("estimated_end_time") else "–"
            facts.append(("Estimated end", expected))
        return facts
