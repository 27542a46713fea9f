"""The output tokens of a pipeline without a budget, leased from the ledger of its tenant: see workflows.llm_ledger."""

import asyncio
from collections.abc import Awaitable, Callable

from temporalio import workflow

with workflow.unsafe.imports_passed_through():
    from google.rpc import code_pb2

    from jobs.pipelines import failure
    from llm_pb import internal_pb2

from pipelines.errors import StepFailed
from workflows.token_leases import leased


class TokenLeases:
    """What the jobs that run may generate. Nothing is leased where the pipeline has no bound a day."""

    def __init__(
        self,
        pipeline_id: str,
        options: internal_pb2.PipelineOptions,
        used: Callable[[], int],
        lease: Callable[[Callable[[], internal_pb2.LeaseRequest]], Awaitable[internal_pb2.LeaseResponse]] = leased,
    ) -> None:
        """`used` returns what the jobs that have ended have used; `lease` asks the ledger."""
        self._lease_of = lease
        self._id = pipeline_id
        self._reservation = options.create_time.ToNanoseconds()
        self._a_day = options.leased_a_day if options.HasField("leased_a_day") else None
        self._used = used
        self._held: dict[str, int] = {}
        # Each lease says what the others hold, so there is one at a time.
        self._turn = asyncio.Lock()

    async def take(self, path: str, tokens: int) -> None:
        """Hold what the job of a step may generate, until the step has ended. Waits for it.

        Raises StepFailed for more than the tenant has a day.
        """
        if self._a_day is not None:
            async with self._turn:
                await self._lease(path, tokens)
                self._held[path] = tokens

    def release(self, path: str) -> None:
        """Release what is held for a step that has ended. The next lease tells the ledger what the step has used."""
        self._held.pop(path, None)

    async def _lease(self, path: str, tokens: int) -> None:
        def request() -> internal_pb2.LeaseRequest:
            return internal_pb2.LeaseRequest(
                workflow_id=self._id,
                used_tokens=self._used(),
                held_tokens=sum(self._held.values()),
                least_tokens=tokens,
                wanted_tokens=tokens,
                output_tokens_limit=self._a_day,
                alone=not self._held,
                reservation=self._reservation,
            )

        if (await self._lease_of(request)).never:
            message = f"the step may use {tokens} output tokens, which is more than its tenant has a day"
            raise StepFailed(path, failure("QUOTA_EXCEEDED", message, code_pb2.RESOURCE_EXHAUSTED))
