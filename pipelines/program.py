"""What the code of a pipeline calls: its steps."""

import json
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from typing import Any, Final, Literal, TypeVar, overload

from temporalio import workflow

with workflow.unsafe.imports_passed_through():
    from google.protobuf.json_format import MessageToDict
    from google.protobuf.message import Message

    from jobs import names
    from jobs.pipelines import (
        INVALID_OUTPUT,
        MAX_STEPS,
        MAX_SUMMARY_BYTES,
        OUTPUT_TOO_LARGE,
        TOO_MANY_STEPS,
        failure,
    )
    from llm_pb import batch_pb2, common_pb2, llm_pb2, pipeline_pb2
    from pipelines.compensation import undo
    from pipelines.errors import StepFailed, contained
    from pipelines.registry import request_of

from pipelines.calls import call_each, call_in_turn
from pipelines.execution import Execution
from pipelines.files import JSON_LINES, Files
from pipelines.forms import Form
from pipelines.job_steps import run_job
from pipelines.nested import run_batch, run_pipeline

_T = TypeVar("_T")
_R = TypeVar("_R")
_ROLES: Final = {"system": llm_pb2.ROLE_SYSTEM, "user": llm_pb2.ROLE_USER, "assistant": llm_pb2.ROLE_ASSISTANT}


@dataclass(frozen=True)
class Generated:
    """What a job has generated. An output of more than 64 KiB is a file, if the operator has a store."""

    result: llm_pb2.JobResult
    """The whole result of the job."""
    files: Files
    json: Any = None
    """The output as JSON, where a schema was given."""

    @property
    def text(self) -> str:
        """The output. Raises StepFailed with the reason OUTPUT_TOO_LARGE where it is a file: see read()."""
        if (file := self.file) is not None:
            message = f"the output is a file of {file.size_bytes} bytes: pass it on as prompt_file, or read() it"
            raise StepFailed(file.file_id, failure(OUTPUT_TOO_LARGE, message))
        return self.result.output

    @property
    def file(self) -> common_pb2.FileRef | None:
        """The output as a file, for `prompt_file` of a next step; None where `text` has it."""
        return self.result.output_file if self.result.HasField("output_file") else None

    async def read(self) -> str:
        """Return the output, also where it is a file of at most 1 MiB, which then is in the history. See Files.get."""
        return self.result.output if self.file is None else await self.files.get(self.file)


class Pipeline:
    """A pipeline as its own code sees it. What it does is durable: after a crash the code goes on where it was.

    Names of steps are of a-z, 0-9, _ and -, and may have "/" between them, as "rounds/2/write". No two steps have the
    same one.
    """

    def __init__(self, execution: Execution, below: str = "") -> None:
        self._execution = execution
        self._below = below

    @property
    def id(self) -> str:
        """The pipeline's id."""
        return self._execution.id

    def within(self, name: str) -> "Pipeline":
        """Return the same pipeline for steps below a name."""
        return Pipeline(self._execution, f"{self._path(name)}/")

    @property
    def files(self) -> Files:
        """The files of the pipeline's user."""
        return Files(self._execution, self._below)

    async def generate(
        self,
        name: str,
        *,
        model: str,
        prompt: str = "",
        messages: Iterable[Mapping[str, str]] = (),
        prompt_file: common_pb2.FileRef | None = None,
        schema: Mapping[str, Any] | None = None,
        timeout: timedelta | None = None,
        cache: timedelta | None = None,
        **params: Any,
    ) -> Generated:
        """Run a job and return what it has generated.

        One of `prompt`, `messages` and `prompt_file` is given: a message is {"role": "user", "content": "…"}, a file is
        one of the pipeline's user or the output of a step. `schema` is a JSON Schema that the output keeps. `timeout`
        bounds the job, the wait for a worker included; by default by the time that is left to the pipeline. `cache` is
        the ttl of JobRequest.cache, with which an equal step of any pipeline of the tenant generates once. `params` are
        fields of SamplingParams. Without `max_tokens` a schema that bounds its texts and lists by maxLength and
        maxItems gets a token for each character that it allows, at least the model's default and at most its maximum,
        so that its JSON is not cut. Raises StepFailed, with the reason INVALID_OUTPUT for JSON that is cut, or lacks
        what the schema requires.
        """
        chosen = llm_pb2.SamplingParams(**params)
        job = llm_pb2.JobRequest(model=model, prompt=prompt, prompt_file=prompt_file, params=chosen)
        for message in messages:
            job.messages.add(role=_ROLES[message["role"]], content=message["content"])
        if schema is not None:
            job.params.json_schema = json.dumps(schema)
        if cache is not None:
            job.cache.ttl.FromTimedelta(cache)
        async with self._execution.step(self._path(name), pipeline_pb2.STEP_KIND_JOB) as step:
            if schema is None:
                return Generated(await run_job(self._execution, step, job, timeout), self.files)
            form = Form(schema, self.files)
            result = await run_job(self._execution, step, job, timeout, form.is_usable)
            return Generated(result, self.files, await form.value(step.path, result))

    async def image(
        self,
        name: str,
        *,
        model: str,
        prompt: str,
        size: llm_pb2.ImageSize | None = None,
        seed: int | None = None,
        timeout: timedelta | None = None,
    ) -> common_pb2.FileRef:
        """Run a job on a model that makes images, and return the file of the image.

        `size` is one of the model's. `timeout` is as for generate(). Raises StepFailed.
        """
        params = llm_pb2.SamplingParams(seed=seed)
        job = llm_pb2.JobRequest(model=model, prompt=prompt, params=params, image_size=size)

        async def has_images(result: llm_pb2.JobResult) -> bool:
            return bool(result.images)

        async with self._execution.step(self._path(name), pipeline_pb2.STEP_KIND_JOB) as step:
            result = await run_job(self._execution, step, job, timeout, has_images)
            if not result.images:
                raise StepFailed(step.path, failure(INVALID_OUTPUT, f"the model {model} makes no images"))
            return result.images[0]

    @overload
    async def map(
        self,
        name: str,
        items: Sequence[_T],
        function: "Callable[[Pipeline, _T], Awaitable[_R]]",
        *,
        limit: int = ...,
        return_exceptions: Literal[False] = ...,
    ) -> list[_R]: ...

    @overload
    async def map(
        self,
        name: str,
        items: Sequence[_T],
        function: "Callable[[Pipeline, _T], Awaitable[_R]]",
        *,
        limit: int = ...,
        return_exceptions: bool,
    ) -> list[_R | Exception]: ...

    async def map(
        self,
        name: str,
        items: Sequence[_T],
        function: "Callable[[Pipeline, _T], Awaitable[_R]]",
        *,
        limit: int = 10,
        return_exceptions: bool = False,
    ) -> list[Any]:
        """Call a function for each item, at most `limit` at the same time, and return the results in their order.

        The function gets a pipeline whose steps are below `<name>/<number of the item>`. If it raises an error, the
        other calls are cancelled, and map() raises the error. With `return_exceptions`, as that of asyncio.gather(),
        the error is the result of the item instead, and the other calls go on.
        Raises ValueError for a `limit` below 1, and StepFailed with TOO_MANY_STEPS, before the first call, for more
        items than the pipeline may still begin steps.
        """
        if limit < 1:
            raise ValueError(f"limit must be 1 or more, not {limit}")

        async def call(number: int, item: _T) -> _R | Exception:
            try:
                return await contained(function(self.within(f"{name}/{number}"), item))
            except Exception as error:
                if not return_exceptions:
                    raise
                return error

        if min(limit, len(items)) > 1:
            self._execution.admission.together = workflow.patched(names.PATCH_ADMITS_TOGETHER)
        left = self._execution.tree.left
        if len(items) > min(limit, left) and workflow.patched(names.PATCH_WIDE_MAPS):
            if len(items) > left and not self._execution.compensating:
                message = (
                    f"{len(items)} items, and {left} of {MAX_STEPS} steps are left: split the items among pipelines"
                )
                raise StepFailed(self._path(name), failure(TOO_MANY_STEPS, message))
            return await call_in_turn(call, items, limit, lambda: self._execution.cancels_once)
        return await call_each(call, items, limit, lambda: self._execution.cancels_once)

    async def batch(
        self,
        name: str,
        lines: common_pb2.FileRef | Iterable[llm_pb2.JobRequest],
        *,
        timeout: timedelta | None = None,
        **fields: Any,
    ) -> batch_pb2.BatchStatus:
        """Run a batch, and return how it ended: its counts, and the files of its output and of its errors.

        `lines` are a file of the pipeline's user, as BatchRequest.input, or jobs, each with a request_id of its own, of
        at most 1 MiB together. `fields` are fields of BatchRequest, such as `defaults`. Raises StepFailed for a batch
        that does not succeed; items may have failed in one that does.
        """
        if not isinstance(lines, common_pb2.FileRef):
            text = "".join(f"{json.dumps(MessageToDict(job))}\n" for job in lines)
            lines = await self.files.put(f"{name}-lines", text, media_type=JSON_LINES)
        batch = batch_pb2.BatchRequest(input=lines, **fields)
        async with self._execution.step(self._path(name), pipeline_pb2.STEP_KIND_BATCH) as step:
            return await run_batch(self._execution, step, batch, timeout)

    async def pipeline(self, name: str, code: str, spec: Message, *, timeout: timedelta | None = None) -> Any:
        """Run a registered pipeline as a step, and return what it returns. `code` is its name, `spec` its input.

        It has a history, a tree and a limit of 2,000 steps of its own, so many steps are split among several. It is
        followed by its own id, which the step shows; here the step has its usage and counts once it has ended. Its
        steps have what is left of time and budget. Raises StepFailed, and ValueError for a name that is not registered.
        """
        request, found = request_of(code, spec)
        async with self._execution.step(self._path(name), pipeline_pb2.STEP_KIND_PIPELINE) as step:
            result = await run_pipeline(self._execution, step, request, timeout)
            value = found.result()
            result.value.Unpack(value)
            return value

    async def step(
        self, name: str, activity: Any, argument: Any, *, task_queue: str, timeout: timedelta | None = None, **more: Any
    ) -> Any:
        """Run an activity of a worker of the operator's, and return its result: any code, any framework.

        `activity` is the activity or its name. It is tried up to 3 times, each of them for at most ten minutes, unless
        `more`, which are arguments of workflow.execute_activity, says otherwise; give `result_type` with a name. A
        worker that dies is noticed when its try is over: `start_to_close_timeout` says how long one may take, and
        `heartbeat_timeout`, for an activity that beats, notices it earlier. `timeout` bounds all tries together. Raises
        StepFailed.
        """
        async with self._execution.step(self._path(name)) as step:
            settings = {"task_queue": task_queue, **more}
            return await self._execution.run_activity(step, activity, argument, timeout, settings)

    async def approve(self, name: str, question: str, *, timeout: timedelta | None = None) -> bool:
        """Wait until somebody answers the question by AnswerStep, and return whether they approve.

        Raises StepFailed when nobody has answered in time.
        """
        async with self._execution.step(self._path(name), pipeline_pb2.STEP_KIND_APPROVAL) as step:
            return await self._execution.ask(step, question, timeout)

    def compensate(self, function: Callable[..., Awaitable[object]], *arguments: Any) -> None:
        """Register a function that is called if the pipeline does not succeed, whatever ends it: the last one first.

        It undoes what steps have done. Its steps are bound by no limit of the pipeline. A cancel does not stop them.
        An error in one of them does not keep the others from their work.
        """
        self._execution.compensations.append(partial(undo, function, *arguments))

    def note(self, name: str, summary: Mapping[str, Any]) -> None:
        """Show a small JSON object with a step that has begun, such as a score.

        Raises ValueError for a large one, and for NaN, which is no JSON.
        """
        text = json.dumps(summary, allow_nan=False)
        if len(text.encode()) > MAX_SUMMARY_BYTES:
            raise ValueError(f"a summary has at most {MAX_SUMMARY_BYTES} bytes, not {len(text.encode())}")
        self._execution.tree.change(self._path(name)).summary_json = text

    def _path(self, name: str) -> str:
        return f"{self._below}{name}"
