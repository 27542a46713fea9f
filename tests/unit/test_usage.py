"""What pieces of work have used together, and what a budget leaves of it."""

from jobs.batches import add_usage
from jobs.usage import left_of, spent_field
from llm_pb import common_pb2

PAID = common_pb2.Usage(prompt_tokens=1, output_tokens=9, cost_micros=100)
NOTHING = common_pb2.Usage()
UNPRICED = common_pb2.Usage(prompt_tokens=1, output_tokens=9)


def total(*pieces: common_pb2.Usage) -> common_pb2.Usage:
    usage = common_pb2.Usage()
    for piece in pieces:
        add_usage(usage, piece)
    return usage


def test_what_has_used_nothing_costs_nothing() -> None:
    """A piece that was refused, or asked for an answer, made the cost unknown and the budget whole again."""
    for pieces in ([PAID, NOTHING, PAID], [NOTHING, PAID, PAID], [PAID, PAID, NOTHING]):
        usage = total(*pieces)
        assert usage.cost_micros == 200
        assert spent_field(left_of(common_pb2.Budget(cost_micros=200), usage)) == "cost_micros"
    assert not total(NOTHING, NOTHING).HasField("cost_micros")


def test_tokens_without_a_price_make_the_cost_unknown() -> None:
    for pieces in ([PAID, UNPRICED, PAID], [UNPRICED, PAID], [NOTHING, UNPRICED, PAID]):
        assert not total(*pieces).HasField("cost_micros")
    assert total(PAID, UNPRICED).output_tokens == 18
