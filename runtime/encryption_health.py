"""The keys of encryption at /readyz, and the wait for those that other services share."""

import asyncio
import logging
from collections.abc import Iterable, Iterator
from contextlib import suppress
from datetime import timedelta
from itertools import chain
from typing import Final

from temporalio.api.common.v1 import Payload
from temporalio.api.workflowservice.v1 import ListWorkflowExecutionsRequest
from temporalio.client import Client
from temporalio.service import RPCError, RPCStatusCode

from encryption import Encryption, KeysUnavailable, Unreadable
from encryption.cipher import KeyId
from payload_converter.encryption import key_of
from runtime.health import CHECK_TIMEOUT, Readiness

_RETRY: Final = timedelta(seconds=1)
_WORK: Final = "WorkflowType IN ('LLMJobWorkflow', 'LLMBatchWorkflow', 'LLMPipelineWorkflow')"
_NO_KEYS: Final = "are missing: new work is encrypted, and this service has no keys; set ENCRYPTION_KEY_STORE"
_OTHER_STORE: Final = "are those of another key store: new work is encrypted with {}, which ENCRYPTION_KEY_STORE lacks"
_NEWEST: Final = 100
"""Number of the newest jobs, batches and pipelines that are open, and of those that have ended last, whose keys a
service has to have. It begins to encrypt for their tenants, too."""
_SILENCE: Final = timedelta(seconds=30)
"""Time for which Temporal is asked for them again when it does not answer. It may never do: then nothing is known."""
_NO_ANSWER: Final = (RPCStatusCode.UNAVAILABLE, RPCStatusCode.DEADLINE_EXCEEDED, RPCStatusCode.RESOURCE_EXHAUSTED)

_log = logging.getLogger(__name__)


def want_keys(readiness: Readiness, encryption: Encryption | None) -> None:
    """Report keys that are not available as degraded. Does nothing without encryption."""
    if encryption is None:
        return

    async def available() -> bool | str:
        return await encryption.keys.present_problem() or True

    readiness.want("keys", "are not all available", available)


async def wait_for_shared_keys(client: Client, readiness: Readiness, encryption: Encryption | None) -> None:
    """Wait while the newest work shows that other services have keys that this one has not.

    It would fail each job that it takes, or encrypt with a key that the others do not have.
    """
    now = asyncio.get_running_loop().time
    end = now() + _SILENCE.total_seconds()
    problem = ""

    async def have_come() -> bool | str:
        return problem or True

    while True:
        try:
            found = await _lack_of_keys(client, encryption)
        except (RPCError, KeysUnavailable) as error:
            if isinstance(error, RPCError) and not problem and (error.status not in _NO_ANSWER or now() > end):
                _log.warning("Temporal does not say whether other services have other keys: %s", error)
                return
        else:
            if found and not problem:
                _log.error("keys %s", found)
                readiness.need("keys", found, have_come)
            problem = found
            if not problem:
                return
        await asyncio.sleep(_RETRY.total_seconds())


async def _lack_of_keys(client: Client, encryption: Encryption | None) -> str:
    """Return why the service cannot have the keys of the newest work. Empty if it can.

    Raises RPCError where Temporal does not say, KeysUnavailable while the key store cannot be read.
    """
    keys = await _newest_keys(client)
    if encryption is None:
        return _NO_KEYS if keys else ""
    lacking = [key for key in keys if await encryption.keys.lacks(key)]
    return _OTHER_STORE.format(lacking[0]) if lacking else ""


async def _newest_keys(client: Client) -> list[KeyId]:
    """Return the keys of the newest work, the newest first. Raises RPCError."""
    found = []
    # Temporal lists what is open before what has ended.
    for state in ("=", "!="):
        query = f"{_WORK} AND ExecutionStatus {state} 'Running'"
        request = ListWorkflowExecutionsRequest(namespace=client.namespace, query=query, page_size=_NEWEST)
        found.append(await client.workflow_service.list_workflow_executions(request, timeout=CHECK_TIMEOUT))
    memos = (one.memo.fields.values() for answer in found for one in answer.executions)
    return [*dict.fromkeys(_keys_of(chain.from_iterable(memos)))]


def _keys_of(payloads: Iterable[Payload]) -> Iterator[KeyId]:
    for payload in payloads:
        # A workflow that was started by hand may hold anything.
        with suppress(Unreadable):
            if (key := key_of(payload)) is not None:
                yield key
