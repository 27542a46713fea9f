"""The lines of a batch become its plan, in the process of its own that work.py is."""

import asyncio
from collections.abc import Iterator
from contextlib import ExitStack
from tempfile import TemporaryFile
from typing import IO, Final

import uvloop
from google.protobuf import proto

from batches.input import BatchInput, InputTooLarge
from batches.lines import Line
from batches.objects import folder_of
from batches.plan import PlanWriter
from batches.results import bad_item, invalid_input, to_line
from encryption import Encryption
from jobs.field_rules import Violation
from llm_pb import internal_pb2, llm_pb2
from runtime.auth import Caller, Refusal
from services.gateway.batches.line_files import LineFiles
from services.gateway.batches.local_files import JSONL, fetch, pieces_of, put
from services.gateway.job_bounds import JobBounds
from services.gateway.models.catalogue import Models
from services.gateway.scopes import check_submit
from services.gateway.settings import GatewaySettings
from store.store import Store, StoredObject

_OF_JOB: Final = "job."


class _OperatorsRules:
    """What this gateway refuses of a job, and what the batch's creator may not ask for."""

    def __init__(
        self, settings: GatewaySettings, models: Models, task: internal_pb2.PlanTask, files: LineFiles
    ) -> None:
        self._files = files
        self._bounds = JobBounds(models, settings, None)
        self._models = models
        self._needs_price = bool(task.request.batch.budget.cost_micros)
        self._creator = Caller(task.request.tenant, "", frozenset(task.request.scopes))
        # The checks of the gateway wait for threads that count tokens.
        self._loop = uvloop.new_event_loop()

    def check(self, job: llm_pb2.JobRequest) -> Iterator[Violation]:
        """Yield the violations of a job."""
        request = llm_pb2.SubmitRequest(job=job)
        violations = self._loop.run_until_complete(self._bounds.check(request, self._creator)) or self._files.check(job)
        for field, description in violations:
            yield Violation(field.removeprefix(_OF_JOB), description)
        model = self._models.get(job.model)
        if self._needs_price and model is not None and model.price is None:
            yield Violation("model", "has no price, so the budget.cost_micros of the batch cannot be kept")
        if model is not None and model.image_sizes:
            yield Violation("model", "makes images, which no batch does")
        try:
            check_submit(self._creator, request)
        except Refusal as refusal:
            yield Violation("", str(refusal))

    def close(self) -> None:
        self._files.close()
        self._loop.close()


async def plan(
    task: internal_pb2.PlanTask, store: Store, settings: GatewaySettings, encryption: Encryption | None
) -> internal_pb2.BatchPlan:
    """Return the plan of a batch, whose objects are in the store. Raises the errors of the store."""
    request = task.request
    content = [StoredObject(segment.name, segment.size) for segment in task.content]
    models = Models(settings.models)
    with ExitStack() as stack:
        lines = stack.enter_context(await fetch(store, content, request.limits.bytes or None))
        writer = stack.enter_context(PlanWriter())
        ordered, bad_lines, bad_items = (stack.enter_context(TemporaryFile()) for _ in range(3))
        rules = _OperatorsRules(settings, models, task, LineFiles(request, store, models, encryption))
        stack.callback(rules.close)
        found = await asyncio.to_thread(_read, request, lines, writer, rules, bad_lines, bad_items)
        folder = folder_of(request.batch_id, request.tenant)
        if found.HasField("error"):
            if found.bad_count:
                found.bad_lines.CopyFrom(await put(store, task.errors_prefix, bad_lines, JSONL))
                found.bad_items.CopyFrom(await put(store, folder, bad_items))
            return found
        found.groups.extend(writer.groups)
        for group in found.groups:
            # Every line was checked, so the model is there.
            if (model := models.get(group.model)) is not None:
                group.queue, group.default_max_tokens = model.queue, model.default_max_tokens
                if model.price is not None:
                    group.price.CopyFrom(model.price.message())
        await asyncio.to_thread(lambda: [ordered.write(piece) for piece in writer.pieces()])
        found.plan.CopyFrom(await put(store, folder, ordered))
        found.input.CopyFrom(await put(store, folder, lines))
    return found


def _read(
    request: internal_pb2.PlanRequest,
    lines: IO[bytes],
    writer: PlanWriter,
    rules: _OperatorsRules,
    bad_lines: IO[bytes],
    bad_items: IO[bytes],
) -> internal_pb2.BatchPlan:
    """Read the lines into the writer, and bad ones into their files; return the plan without its objects."""
    whole = BatchInput(request.batch, request.limits, rules.check)

    def add(line: Line) -> None:
        if not line.problems:
            writer.add(line)
            return
        item = bad_item(line)
        bad_lines.write(to_line(line, item, request.batch_id, item.end_time).data)
        proto.serialize_length_prefixed(item, bad_items)  # type: ignore[arg-type]  # any file will do

    try:
        for piece in pieces_of(lines):
            for line in whole.feed(piece):
                add(line)
        for line in whole.close():
            add(line)
    except InputTooLarge as error:
        return internal_pb2.BatchPlan(error=invalid_input([error.violation]))
    if whole.bad:
        return internal_pb2.BatchPlan(bad_count=whole.bad, error=invalid_input(whole.violations))
    return internal_pb2.BatchPlan()
