"""Redeliver of a job that is deleted while its deliveries are sent again."""

from types import SimpleNamespace
from typing import Any

import pytest
from temporalio.client import WorkflowExecutionStatus

from llm_pb import internal_pb2, llm_pb2
from runtime.auth import Caller
from services.gateway import delivery_service
from services.gateway.delivery_reader import Standing
from services.gateway.delivery_service import DeliveryService
from services.gateway.errors import JobNotFound, batch_not_found, not_found, pipeline_not_found
from services.gateway.settings import GatewaySettings

CALLER = Caller(tenant="", subject="", scopes=frozenset())
JOB = "llmjob-alice-1"


class Reader:
    """Has the job for so many calls."""

    def __init__(self, gone: Exception, calls: int = 0) -> None:
        self._gone = gone
        self._left = calls

    async def describe(self, caller: Caller, workflow_id: str) -> Any:
        if self._left == 0:
            raise self._gone
        self._left -= 1
        return SimpleNamespace(status=WorkflowExecutionStatus.COMPLETED)


async def test_a_job_that_is_deleted_meanwhile_is_not_found_and_leaves_no_deliveries(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    deleted: list[str] = []
    state = internal_pb2.DeliveryState(deliveries=[llm_pb2.Delivery(id="1")])

    async def standing(*_: object) -> Standing:
        return Standing(state, "llmnotify-alice-1", open=False)

    async def start(*_: object, **__: object) -> None:
        """Do nothing."""

    async def delete(id_: str, _: object) -> None:
        deleted.append(id_)

    async def link_call(_: object) -> None:
        """Do nothing."""

    monkeypatch.setattr(delivery_service, "Runs", lambda _: SimpleNamespace(delete=delete))
    monkeypatch.setattr(delivery_service, "link_call", link_call)
    fakes: list[Any] = [
        SimpleNamespace(),
        SimpleNamespace(start=start),
        Reader(not_found(JOB), calls=1),
        Reader(batch_not_found(JOB)),
        Reader(pipeline_not_found(JOB)),
        SimpleNamespace(standing=standing),
    ]
    service = DeliveryService(*fakes, GatewaySettings())
    with pytest.raises(JobNotFound, match="there is no job"):
        await service.redeliver(CALLER, llm_pb2.RedeliverRequest(workflow_id=JOB))
    assert deleted == ["llmnotify-alice-1"]
