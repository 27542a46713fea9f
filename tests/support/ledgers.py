"""Ledgers of open jobs, started by hand."""

from typing import Any

from temporalio.client import Client

from jobs import names
from jobs.ids import ledger_workflow_id
from llm_pb import internal_pb2


async def start_ledger(temporal: Client, tenant: str, **state: Any) -> None:
    """Start a tenant's ledger, with times and numbers that a gateway does not give it: see LedgerState."""
    await temporal.start_workflow(
        names.LEDGER_WORKFLOW_TYPE,
        internal_pb2.LedgerState(**state),
        id=ledger_workflow_id(tenant),
        task_queue=names.WORKFLOW_QUEUE,
    )
