"""Reads the records that open workflows keep, of a file for example. For clients of Temporal, no workflow."""

from datetime import timedelta
from typing import TypeVar

from google.protobuf.message import Message
from temporalio.client import Client
from temporalio.service import RPCError, RPCStatusCode

from jobs import names

_M = TypeVar("_M", bound=Message)


async def read_record(client: Client, workflow_id: str, kind: type[_M], within: timedelta) -> _M:
    """Return what a workflow answers to the query GetRecord; an empty message where there is no such workflow.

    Raises RPCError, WorkflowQueryFailedError, KeysUnavailable, PayloadError.
    """
    handle = client.get_workflow_handle(workflow_id)
    try:
        record: _M = await handle.query(names.QUERY_GET_RECORD, result_type=kind, rpc_timeout=within)
    except RPCError as error:
        if error.status == RPCStatusCode.NOT_FOUND:
            return kind()
        raise
    return record
