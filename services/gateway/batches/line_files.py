"""Checks the prompt_file of a batch's lines, in the process of its own that work.py is."""

import asyncio
from contextlib import ExitStack

from google.rpc import code_pb2
from temporalio.runtime import Runtime
from temporalio.service import RPCError

from encryption import Encryption
from jobs.field_rules import Violation
from llm_pb import internal_pb2, llm_pb2
from runtime import temporal
from runtime.auth import Caller
from runtime.health import Readiness
from runtime.telemetry import tracing
from services.gateway.errors import ApiError
from services.gateway.files.reader import FileReader
from services.gateway.models.catalogue import Models
from services.gateway.page_token import PageTokens
from services.gateway.prompt_files import PromptFiles
from store.store import Store, StoreUnavailable

_SERVICE = "batches"


class LineFiles:
    """The files that lines name. A file counts for a line if it is the batch's user's."""

    def __init__(
        self, request: internal_pb2.PlanRequest, store: Store, models: Models, encryption: Encryption | None
    ) -> None:
        """Must be created on the event loop that runs while lines are checked in a thread."""
        self._owner = Caller(request.tenant, "", frozenset(request.scopes), user_id=request.batch.user_id)
        self._store = store
        self._models = models
        self._encryption = encryption
        self._loop = asyncio.get_running_loop()
        self._stack = ExitStack()
        self._checks: PromptFiles | None = None
        self._known: dict[tuple[str, bytes], list[Violation]] = {}

    def check(self, job: llm_pb2.JobRequest) -> list[Violation]:
        """Return what is wrong with the prompt_file of a job, from the thread of the lines.

        Raises StoreUnavailable while the store or Temporal is away, KeysUnavailable.
        """
        if not job.HasField("prompt_file"):
            return []
        key = job.model, job.prompt_file.SerializeToString(deterministic=True)
        if key not in self._known:
            self._known[key] = asyncio.run_coroutine_threadsafe(self._check(job), self._loop).result()
        return self._known[key]

    def close(self) -> None:
        """Free what the checks have opened."""
        self._stack.close()

    async def _check(self, job: llm_pb2.JobRequest) -> list[Violation]:
        if self._checks is None:
            # Most batches have no such line, and need no connection.
            self._stack.enter_context(tracing(_SERVICE, temporal.new_provider))
            client = await temporal.connect(Runtime.default(), Readiness(_SERVICE), self._encryption)
            reader = FileReader(client, PageTokens(None), self._encryption, knows_tenants=False)
            self._checks = PromptFiles(reader, self._store, self._models)
        try:
            return await self._checks.check(self._owner, job)
        except RPCError as error:
            raise StoreUnavailable(f"Temporal does not tell a file: {error}") from error
        except ApiError as error:
            if error.status.code == code_pb2.UNAVAILABLE:
                raise StoreUnavailable(str(error)) from error
            return [Violation("job.prompt_file", str(error))]
