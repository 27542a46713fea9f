"""What a job costs by the price of its model, and what its budget allows: exact, in integers that are rounded once."""

from typing import Final

from jobs.errors import BudgetSpent, InvalidJob
from llm_pb import common_pb2, internal_pb2, llm_pb2

_MILLION: Final = 1_000_000


def cost_micros(price: llm_pb2.ModelPrice, prompt_tokens: int, output_tokens: int) -> int:
    """Return what the tokens cost, in millionths of the currency, rounded up."""
    exact = prompt_tokens * price.prompt_micros_per_million + output_tokens * price.output_micros_per_million
    return -(-exact // _MILLION)


def spent_by_prompt(
    budget: common_pb2.Budget, price: llm_pb2.ModelPrice | None, prompt_tokens: int
) -> tuple[str, str] | None:
    """Return the field of the budget that leaves a prompt of this size no output token, and the reason.

    Return None where there is room for one. A model without a `price` costs nothing here.
    """
    if budget.prompt_tokens and prompt_tokens > budget.prompt_tokens:
        return "prompt_tokens", f"is {budget.prompt_tokens}, but the prompt has {prompt_tokens} tokens"
    if budget.cost_micros and price is not None and (cost := cost_micros(price, prompt_tokens, 1)) > budget.cost_micros:
        why = f"is {budget.cost_micros}, but {prompt_tokens} prompt tokens and one output token cost {cost}"
        return "cost_micros", why
    return None


def output_allowance(budget: common_pb2.Budget, price: llm_pb2.ModelPrice | None, prompt_tokens: int) -> int | None:
    """Return the maximum number of output tokens, at least 1, that the budget allows; None if it does not bound them.

    Raises BudgetSpent if the prompt leaves room for none, InvalidJob for a budget of costs without a price.
    """
    if budget.cost_micros and price is None:
        raise InvalidJob("budget.cost_micros: the model has no price")
    if (spent := spent_by_prompt(budget, price, prompt_tokens)) is not None:
        raise BudgetSpent(f"budget.{spent[0]} {spent[1]}")
    bounds = [budget.output_tokens] if budget.output_tokens else []
    if budget.cost_micros and price is not None and price.output_micros_per_million:
        left = budget.cost_micros * _MILLION - prompt_tokens * price.prompt_micros_per_million
        bounds.append(left // price.output_micros_per_million)
    return min(bounds, default=None)


def reserved_tokens(job: llm_pb2.JobRequest, default_max_tokens: int) -> int:
    """Return the maximum number of output tokens of a job, as far as it is known without the prompt."""
    most = job.params.max_tokens if job.params.HasField("max_tokens") else default_max_tokens
    return min(most, job.budget.output_tokens or most)


def used_tokens(result: llm_pb2.JobResult | None) -> int:
    """Return the number of output tokens of a job that count, by its result if there is one."""
    return 0 if result is None or result.metadata.cached else result.metadata.output_tokens


def set_price(request: internal_pb2.RunRequest, options: internal_pb2.JobOptions) -> None:
    """Write the price of the model into the request of the job's worker, if the job has a budget of costs."""
    if request.job.budget.cost_micros and options.HasField("price"):
        request.price.CopyFrom(options.price)


def add_cost(metadata: llm_pb2.ResultMetadata, options: internal_pb2.JobOptions) -> None:
    """Write what the job costs into the metadata of its result, if its model had a price as it was accepted.

    What a provider has charged stays. An answer from the cache costs nothing.
    """
    if options.HasField("price") and metadata.cached:
        metadata.cost_micros = 0
    if options.HasField("price") and not metadata.HasField("cost_micros"):
        metadata.cost_micros = cost_micros(options.price, metadata.prompt_tokens, metadata.output_tokens)
