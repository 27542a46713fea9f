"""The deletion of what a user has: see services.gateway.deletion.owned."""

from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from types import SimpleNamespace
from typing import Any

from temporalio.client import WorkflowExecutionStatus

from llm_pb import internal_pb2
from services.gateway.deletion.owned import OwnedDeletion

BEGUN = datetime(2026, 1, 1, tzinfo=UTC)


class Temporal:
    """A client whose namespace has the records of some files that are gone, the newest first."""

    namespace = "test"

    def __init__(self, started: list[datetime]) -> None:
        self.removed: list[str] = []
        self.workflow_service = self
        self._records = [self._record(f"llmfile-{number}", time) for number, time in enumerate(started)]

    def _record(self, id_: str, started: datetime) -> Any:
        async def describe(**_: Any) -> Any:
            return record

        async def memo_value(_: str, default: Any) -> Any:
            return default

        record = SimpleNamespace(
            id=id_,
            run_id="run",
            start_time=started,
            workflow_type="LLMFileWorkflow",
            status=WorkflowExecutionStatus.COMPLETED,
            describe=describe,
            memo_value=memo_value,
        )
        return record

    async def list_workflows(self, *_: Any, **__: Any) -> AsyncIterator[Any]:
        for record in self._records:
            yield record

    def get_workflow_handle(self, id_: str, **_: Any) -> Any:
        return next(record for record in self._records if record.id == id_)

    async def delete_workflow_execution(self, request: Any, **_: Any) -> None:
        self.removed.append(request.workflow_execution.workflow_id)


async def test_files_that_are_too_new_hide_no_other() -> None:
    """However many the user uploads meanwhile, what is older is found."""
    newer = [BEGUN + timedelta(minutes=1)] * 150
    client: Any = Temporal([*newer, BEGUN - timedelta(days=1)])
    request = internal_pb2.DeleteOwnedRequest(user_id="leaver")
    request.before.FromDatetime(BEGUN)
    assert (await OwnedDeletion(client, None).delete_files(request)).found
    assert client.removed == ["llmfile-150"]
