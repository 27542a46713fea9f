"""Everything besides single jobs that holds what users write: a file, a large output, a batch, a schedule, pipelines.

A stack that is given to `write_marked` has the pipelines of tests.support.pipelines.
"""

from collections.abc import Awaitable
from dataclasses import dataclass
from typing import Any

import grpc
from google.protobuf.struct_pb2 import Struct
from google.protobuf.wrappers_pb2 import StringValue

from jobs.ids import file_workflow_id
from llm_pb import batch_pb2, llm_pb2, pipeline_pb2
from llm_pb.batch_pb2_grpc import BatchServiceStub
from llm_pb.file_pb2_grpc import FileServiceStub
from llm_pb.llm_pb2_grpc import LlmServiceStub
from llm_pb.pipeline_pb2_grpc import PipelineServiceStub
from llm_pb.schedule_pb2_grpc import ScheduleServiceStub
from tests.support import pipelines, schedules
from tests.support.batches import Stubs, create
from tests.support.files import PATIENCE, download, get, new_file, upload
from tests.support.jobs import new_job, run_job
from tests.support.schedules import new_schedule

MODEL = "docstrings"


@dataclass(frozen=True)
class Marked:
    """The ids of what was written."""

    file: str
    output: str
    """The file that is the large output of a job."""
    batch: batch_pb2.BatchStatus
    schedule: str
    pipeline: str
    """A pipeline that has ended."""
    broken: str
    """A pipeline whose code has failed."""
    waiting: str
    """A pipeline that waits for an answer."""

    @property
    def workflows(self) -> list[str]:
        """The ids of workflows whose histories hold what users wrote."""
        of_pipelines = [self.pipeline, f"{self.pipeline}/first", self.broken, self.waiting]
        return [file_workflow_id(self.file, ""), self.batch.batch_id, *of_pipelines]


async def write_marked(channel: grpc.aio.Channel, marker: str) -> Marked:
    """Put the marker into what a caller can write, and look that it is where its reader expects it."""
    files: Any = FileServiceStub(channel)
    batches: Any = BatchServiceStub(channel)
    stubs = Stubs(files, batches)
    content = f"{marker} of a file\n".encode() * 5000
    key = new_file(file={"filename": f"{marker}.txt"})
    file = (await upload(files, key, content)).ref.file_id
    assert await download(files, file) == content

    seen = await run_job(LlmServiceStub(channel), new_job(f"[[wide]] {marker}", params={"max_tokens": 500, "seed": 7}))
    output = seen.final.result.output_file.file_id
    assert output, seen.final.status

    asks = new_job(marker, params={"max_tokens": 3, "seed": 7}, cache={"ttl": {"seconds": 3600}})
    assert (await run_job(LlmServiceStub(channel), asks)).final.status.state == llm_pb2.JOB_STATE_SUCCEEDED

    said = {"max_tokens": 20, "choice": {"options": [f"{marker} said so"]}}
    fails = {"prompt": f"{marker} [[fault:failed@3]]", "params": {"max_tokens": 9}}
    lines: list[dict[str, Any]] = [
        {"request_id": f"{marker}-1", "model": MODEL, "prompt": marker, "params": said},
        {"request_id": f"{marker}-2", "model": MODEL, **fails},
    ]
    created = await create(stubs, lines, labels={"marker": marker})
    batch = await stubs.end(created.batch_id)
    assert (batch.counts.succeeded, batch.counts.failed) == (1, 1), batch
    assert marker in str(await stubs.read(batch.output))
    assert marker in str(await stubs.read(batch.errors))
    unknown = await create(stubs, [{"request_id": "x", "model": MODEL, "prompt": marker, marker: 1}])
    bad = await stubs.end(unknown.batch_id)
    assert marker in str(bad.error), bad

    schedule = await schedules.create(ScheduleServiceStub(channel), new_schedule(marker), paused=True)
    return Marked(file, output, batch, schedule, *await write_pipelines(channel, marker))


async def write_pipelines(channel: grpc.aio.Channel, marker: str) -> tuple[str, str, str]:
    """Run a pipeline to its end, one whose code fails, and one that waits for an answer. Return their ids."""
    stub: Any = PipelineServiceStub(channel)
    ended, waiting = [
        (await pipelines.submit(stub, pipelines.new_pipeline("careful", StringValue(value=marker)))).pipeline_id
        for _ in range(2)
    ]
    for id_ in (ended, waiting):
        seen = await pipelines.follow(stub, id_, until=lambda seen: "review/approve" in seen.steps)
        assert marker in seen.steps["review/approve"].question
    await pipelines.answer(stub, ended, "review/approve", "a", approved=True)
    assert (await pipelines.follow(stub, ended)).status.state == llm_pb2.JOB_STATE_FAILED
    spec = Struct()
    spec["text"] = marker
    broken = (await pipelines.submit(stub, pipelines.new_pipeline("broken", spec))).pipeline_id
    assert marker in (await pipelines.follow(stub, broken)).status.root.error.message
    return ended, broken, waiting


def reads(channel: grpc.aio.Channel, marked: Marked) -> dict[str, Awaitable[Any]]:
    """Return a call of each method that shows what was written."""
    files: Any = FileServiceStub(channel)
    batches: Any = BatchServiceStub(channel)
    of_schedules: Any = ScheduleServiceStub(channel)
    of_pipelines: Any = PipelineServiceStub(channel)
    follows = pipeline_pb2.StreamPipelineRequest(pipeline_id=marked.pipeline)
    batch_id = marked.batch.batch_id
    results = batch_pb2.StreamBatchResultsRequest(batch_id=batch_id)
    return {
        "GetFile": get(files, marked.file),
        "DownloadFile": download(files, marked.file),
        "DownloadFile of an output": download(files, marked.output),
        "DownloadFile of the output of a batch": download(files, marked.batch.output.file_id),
        "GetBatch": batches.GetBatch(batch_pb2.GetBatchRequest(batch_id=batch_id), timeout=PATIENCE),
        "StreamBatch": batches.StreamBatch(batch_pb2.StreamBatchRequest(batch_id=batch_id), timeout=PATIENCE).read(),
        "StreamBatchResults": batches.StreamBatchResults(results, timeout=PATIENCE).read(),
        "GetSchedule": schedules.get(of_schedules, marked.schedule),
        "GetPipeline": pipelines.get(of_pipelines, marked.pipeline),
        "StreamPipeline": of_pipelines.StreamPipeline(follows, timeout=PATIENCE).read(),
    }
