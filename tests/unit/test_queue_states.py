"""What ListModels says of the queues of a model: the backlog, and an estimate of the wait, of each class."""

import asyncio
from datetime import timedelta
from types import SimpleNamespace
from typing import Any

import pytest
from temporalio.api.workflowservice.v1 import DescribeTaskQueueRequest, DescribeTaskQueueResponse

from llm_pb import common_pb2
from services.gateway.class_settings import Classes
from services.gateway.models.catalogue import Models
from services.gateway.models.settings import Model

MODEL = Model(name="m", context_tokens=8, max_output_tokens=8, default_max_tokens=8, queue="q")


class Temporal:
    """A Temporal with queues that have these backlogs, and from which so many jobs a second go."""

    namespace = "default"

    def __init__(self, queues: dict[str, tuple[int, float]]) -> None:
        self._queues = queues
        self.asked: list[str] = []
        self.workflow_service = SimpleNamespace(describe_task_queue=self._describe)

    async def _describe(self, request: DescribeTaskQueueRequest, **_: Any) -> DescribeTaskQueueResponse:
        assert request.report_stats
        self.asked.append(request.task_queue.name)
        await asyncio.sleep(0)
        response = DescribeTaskQueueResponse()
        response.stats.approximate_backlog_count, response.stats.tasks_dispatch_rate = self._queues[
            request.task_queue.name
        ]
        return response


async def test_a_class_has_the_backlog_and_the_estimate_of_its_queue() -> None:
    """A queue that no job leaves has none. Whoever asks in the same second causes no further call."""
    temporal: Any = Temporal({"q": (30, 4.0), "q.background": (500, 0.0)})
    models = Models([MODEL], Classes())
    for _ in range(2):
        (info,) = await models.infos(temporal, "", lambda _: False)
        assert info.backlog == 530
        found = {one.job_class: (one.backlog, one.estimated_wait.ToTimedelta()) for one in info.classes}
        assert found == {
            common_pb2.JOB_CLASS_HIGH: (30, timedelta(seconds=7.5)),
            common_pb2.JOB_CLASS_STANDARD: (30, timedelta(seconds=7.5)),
            common_pb2.JOB_CLASS_BACKGROUND: (500, timedelta(0)),
            common_pb2.JOB_CLASS_SCHEDULED: (500, timedelta(0)),
        }
        assert [one.HasField("estimated_wait") for one in info.classes] == [True, True, False, False]
    assert sorted(temporal.asked) == ["q", "q.background"]
    waiting = await models.queue_info(temporal, "q")
    assert waiting is not None
    assert (waiting.backlog, waiting.estimated_wait.ToTimedelta()) == (30, timedelta(seconds=7.5))


@pytest.mark.parametrize("reported", ["q", "q.background", None])
async def test_a_worker_that_does_not_poll_since_it_is_full_serves_its_model(reported: str | None) -> None:
    temporal: Any = Temporal({"q": (30, 4.0), "q.background": (0, 0.0)})
    (info,) = await Models([MODEL], Classes()).infos(temporal, "", lambda queue: queue == reported)
    assert info.available == (reported == "q")


async def test_calls_at_the_same_time_ask_temporal_once() -> None:
    temporal: Any = Temporal({"q": (30, 4.0), "q.background": (500, 0.0)})
    models = Models([MODEL], Classes())
    await asyncio.gather(*(models.infos(temporal, "", lambda _: False) for _ in range(100)))
    assert sorted(temporal.asked) == ["q", "q.background"]
