"""Terminates workflows whose payloads can never be decrypted again.

Temporal's worker fails a workflow whose input it cannot decode. If the workflow has scheduled an activity before and is
replayed, that contradicts its history: the task fails, and is repeated until the workflow's execution timeout.
"""

import dataclasses
import logging
from collections.abc import Sequence
from typing import Final, Self

from temporalio.api.common.v1 import Payload
from temporalio.client import Client
from temporalio.converter import PayloadCodec, SerializationContext, WithSerializationContext
from temporalio.service import RPCError

from encryption import KeyDeleted
from payload_converter import PayloadError
from runtime.temporal import RPC_TIMEOUT

_log = logging.getLogger(__name__)
_REASON: Final = "the keys of its payloads were deleted"


def ending_unreadable(client: Client) -> Client:
    """Return a client for a worker that terminates workflows whose keys were deleted; the same client without a codec.

    A workflow is terminated at its next task, unless this worker has it in memory.
    """
    config = client.config()
    converter = config["data_converter"]
    if converter.payload_codec is None:
        return client
    codec = _EndingCodec(converter.payload_codec, client)
    config["data_converter"] = dataclasses.replace(converter, payload_codec=codec)
    return Client(**config)


class _EndingCodec(PayloadCodec, WithSerializationContext):
    """A codec around another one. Terminates the workflow of its context when one of its keys was deleted."""

    def __init__(self, codec: PayloadCodec, client: Client, workflow_id: str | None = None) -> None:
        self._codec = codec
        self._client = client
        self._workflow_id = workflow_id

    def with_context(self, context: SerializationContext) -> Self:
        """See WithSerializationContext."""
        codec = self._codec.with_context(context) if isinstance(self._codec, WithSerializationContext) else self._codec
        return type(self)(codec, self._client, getattr(context, "workflow_id", None))

    async def encode(self, payloads: Sequence[Payload]) -> list[Payload]:
        """See PayloadCodec."""
        return await self._codec.encode(payloads)

    async def decode(self, payloads: Sequence[Payload]) -> list[Payload]:
        """See PayloadCodec. Raises PayloadError once the workflow was terminated, or could not be this time."""
        try:
            return await self._codec.decode(payloads)
        except PayloadError as error:
            if self._workflow_id and isinstance(error.__cause__, KeyDeleted):
                await self._terminate(self._workflow_id)
            raise

    async def _terminate(self, workflow_id: str) -> None:
        try:
            await self._client.get_workflow_handle(workflow_id).terminate(reason=_REASON, rpc_timeout=RPC_TIMEOUT)
            _log.warning("workflow terminated: %s", _REASON, extra={"workflow_id": workflow_id})
        except RPCError as error:
            # It has ended already and is replayed for a query, or its next task comes here again.
            _log.info("%s was not terminated: %s", workflow_id, error)
