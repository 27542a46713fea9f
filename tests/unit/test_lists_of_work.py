"""What lists of the command line show of work that does not answer."""

from google.protobuf.timestamp_pb2 import Timestamp

from durable_llm.cli import _batch, _pipelines
from llm_pb import batch_pb2, llm_pb2, pipeline_pb2

NOW = Timestamp(seconds=1)


def test_a_batch_that_does_not_answer_is_not_shown_as_running() -> None:
    """Nobody knows whether it does. What has ended is known without its answer."""
    status = batch_pb2.BatchStatus(batch_id="llmbatch-u-1", state=batch_pb2.BATCH_STATE_RUNNING, create_time=NOW)
    assert _batch._row(status)[1] == "open, no answer"
    status.user_id = "u"
    assert _batch._row(status)[1] == "RUNNING"
    ended = batch_pb2.BatchStatus(batch_id="llmbatch-u-1", state=batch_pb2.BATCH_STATE_CANCELLED, end_time=NOW)
    assert _batch._row(ended)[1] == "CANCELLED"


def test_a_pipeline_that_does_not_answer_is_not_shown_as_running() -> None:
    status = pipeline_pb2.PipelineStatus(pipeline_id="llmpipe-u-1", state=llm_pb2.JOB_STATE_RUNNING)
    status.root.start_time.CopyFrom(NOW)
    assert _pipelines._row(status)[2] == "open, no answer"
    status.user_id = "u"
    assert _pipelines._row(status)[2] == "RUNNING"
    ended = pipeline_pb2.PipelineStatus(pipeline_id="llmpipe-u-1", state=llm_pb2.JOB_STATE_FAILED)
    ended.root.end_time.CopyFrom(NOW)
    assert _pipelines._row(ended)[2] == "FAILED"
