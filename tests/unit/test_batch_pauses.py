"""How often the streams of a batch look at it."""

from llm_pb import batch_pb2
from services.gateway.batches.results import Pauses


def test_a_batch_that_is_about_to_end_is_looked_at_soon_and_then_less_and_less_often() -> None:
    pauses = Pauses(1.0)
    assert [pauses.after(batch_pb2.BATCH_STATE_RUNNING) for _ in range(3)] == [1.0, 1.0, 1.0]
    finalizing = [pauses.after(batch_pb2.BATCH_STATE_FINALIZING) for _ in range(6)]
    assert finalizing == [0.1, 0.2, 0.4, 0.8, 1.0, 1.0]
