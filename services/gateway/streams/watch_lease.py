"""Renews the lease of a job that somebody has to watch: see workflows.watch_lease."""

import asyncio
import logging
import random
from datetime import UTC, datetime
from typing import Final

from temporalio.client import WorkflowExecutionDescription
from temporalio.service import RPCError, RPCStatusCode

from encryption import KeysUnavailable
from jobs import names
from payload_converter import PayloadError
from runtime.temporal import RPC_TIMEOUT
from services.gateway.job_reader import JobReader

_log = logging.getLogger(__name__)
_RENEWALS: Final = 3
"""Renewals in the time of one lease. So one may fail, and the next one is still in time."""
_RETRIES: Final = 20
"""Tries in the time of one lease while Temporal does not answer."""

_KEYS_PAUSE_SECONDS: Final = 2


async def renew_lease(reader: JobReader, description: WorkflowExecutionDescription) -> None:
    """Renew the lease of the job until it ends or the task is cancelled. Returns immediately for a job without one.

    A lease that has just begun is not renewed before half of it is over, so that a job which ends soon costs no signal.
    A quarter of the lease is the longest such wait: the clocks of the gateway and of Temporal may differ.
    """
    lease = await _lease_of(description)
    if not lease:
        return
    age = (datetime.now(UTC) - description.start_time).total_seconds()
    pause = min(max(lease / 2 - age, 0), lease / 4)
    while True:
        await asyncio.sleep(pause)
        # With jitter: the clients of a gateway that died come to another one at the same time.
        pause = lease / _RENEWALS * random.uniform(0.8, 1)  # noqa: S311  # no secret
        try:
            await reader.handle(description.id).signal(names.SIGNAL_WATCHED, rpc_timeout=RPC_TIMEOUT)
        except RPCError as error:
            if error.status == RPCStatusCode.NOT_FOUND:
                return
            _log.warning("cannot tell %s that it is watched: %s", description.id, error)
            pause = lease / _RETRIES


async def _lease_of(description: WorkflowExecutionDescription) -> float:
    """Return the seconds of the job's lease, 0 for a job without one."""
    while True:
        try:
            seconds = await description.memo_value(names.MEMO_CANCEL_IF_UNWATCHED, None)
        except PayloadError:
            return 0
        except KeysUnavailable as error:
            _log.warning("cannot read whether %s has to be watched: %s", description.id, error)
            await asyncio.sleep(_KEYS_PAUSE_SECONDS)
        else:
            # A workflow that was started by hand may hold anything.
            return seconds if isinstance(seconds, int | float) and seconds >= 1 else 0
