"""Tells the workflow that waits for a job that the job's outcome is settled: see workflows.llm_scheduled."""

import logging
from datetime import timedelta
from typing import Final

from temporalio.client import Client
from temporalio.service import RPCError

from jobs import names

_log = logging.getLogger(__name__)
_TIMEOUT: Final = timedelta(seconds=2)


async def signal_settled(client: Client, waiter: str) -> None:
    """Signal the workflow. It finds out by itself, later, if it cannot be signalled now."""
    try:
        await client.get_workflow_handle(waiter).signal(names.SIGNAL_JOB_SETTLED, rpc_timeout=_TIMEOUT)
    except RPCError as error:
        # It was terminated, or Temporal does not answer.
        _log.info("%s was not told that its job is settled: %s", waiter, error)
