"""The budget of a job at its worker: what ends an attempt although the engine or max_tokens would allow more."""

from datetime import timedelta

from jobs.costs import output_allowance
from jobs.errors import BudgetSpent
from llm_pb import common_pb2, llm_pb2


def require_time(budget: common_pb2.Budget, engine_time: timedelta) -> None:
    """Raise BudgetSpent if the job has had its time in engines."""
    if budget.HasField("engine_time") and engine_time >= (limit := budget.engine_time.ToTimedelta()):
        raise BudgetSpent(f"budget.engine_time is {limit}, and the job has used it")


def require_more_than(
    job: llm_pb2.JobRequest, price: llm_pb2.ModelPrice | None, prompt_tokens: int, context_tokens: int
) -> None:
    """Raise BudgetSpent if it was the budget that bounded an output which ended with FINISH_REASON_LENGTH."""
    allowed = output_allowance(job.budget, price, prompt_tokens)
    if allowed is not None and allowed < min(job.params.max_tokens, context_tokens - prompt_tokens):
        field = "output_tokens" if allowed == job.budget.output_tokens else "cost_micros"
        raise BudgetSpent(f"budget.{field} is {getattr(job.budget, field)}, which {allowed} output tokens have used")
