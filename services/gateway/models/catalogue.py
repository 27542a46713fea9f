"""The models that jobs may name: their settings, and the state of their queues in Temporal."""

import asyncio
import time
from collections import Counter
from collections.abc import Callable, Iterable
from datetime import UTC, datetime, timedelta
from typing import Final, NamedTuple

from google.protobuf.duration_pb2 import Duration
from temporalio.api.enums.v1 import TaskQueueType
from temporalio.api.taskqueue.v1 import TaskQueue
from temporalio.api.workflowservice.v1 import DescribeTaskQueueRequest
from temporalio.client import Client
from temporalio.service import RPCError

from jobs.classes import NAMES, is_background, queue_of
from jobs.field_rules import MODEL_PATTERN, Violation
from jobs.options import duration
from llm_pb import common_pb2, llm_pb2
from runtime.shared_calls import SharedCalls
from runtime.temporal import RPC_TIMEOUT
from services.gateway.class_settings import Classes
from services.gateway.models.images import check_image
from services.gateway.models.prompts import Lanes, Prompts
from services.gateway.models.settings import Model

_POLLER_FRESH: Final = timedelta(minutes=1)
_CACHE_SECONDS: Final = 1.0
_DEFAULT_CLASSES: Final = Classes()


class QueueState(NamedTuple):
    """The state of one of a model's task queues in Temporal."""

    available: bool
    backlog: int
    dispatch_rate: float
    """Jobs that left the queue per second, lately."""

    @property
    def estimated_wait(self) -> Duration | None:
        """An estimate of the wait of a job that comes now; None while no job leaves the queue."""
        return duration(timedelta(seconds=self.backlog / self.dispatch_rate)) if self.dispatch_rate > 0 else None


class Models:
    """The catalogue of models."""

    def __init__(self, models: Iterable[Model], classes: Classes = _DEFAULT_CLASSES) -> None:
        """Load the configured tokenizers. Raises the error of a missing or broken one."""
        self._models = {model.name: model for model in models}
        self._classes = classes
        lanes = Lanes()
        self._prompts = {
            name: Prompts(
                model.tokenizer,
                model.context_tokens,
                lanes,
                special_tokens_in_messages=model.special_tokens_in_messages,
            )
            for name, model in self._models.items()
            if model.tokenizer is not None
        }
        self._states: dict[str, tuple[float, QueueState]] = {}
        self._calls = SharedCalls()

    def get(self, name: str) -> Model | None:
        """Return the model of that name."""
        return self._models.get(name)

    def with_own_queue(self) -> list[Model]:
        """Return the models that share their queue with no other model."""
        queues = Counter(model.queue for model in self._models.values())
        return [model for model in self._models.values() if queues[model.queue] == 1]

    async def check(self, job: llm_pb2.JobRequest, tenant: str) -> list[Violation]:
        """Return what is wrong with the job of a tenant for its model.

        Raises ApiError RESOURCE_EXHAUSTED like Prompts.check.
        """
        model = self._models.get(job.model)
        if model is None or not _is_of(model, tenant):
            # The rules have refused an invalid name already.
            if MODEL_PATTERN.fullmatch(job.model) is None:
                return []
            return [Violation("job.model", f"is not served here; choose one of: {', '.join(self._names(tenant))}")]
        violations = check_image(job, model)
        if job.budget.cost_micros and model.price is None:
            violations.append(Violation("job.budget.cost_micros", f"the model {model.name} has no price"))
        if model.image_sizes:
            return violations
        if job.params.max_tokens > model.max_output_tokens:
            violations.append(Violation("job.params.max_tokens", f"must be at most {model.max_output_tokens}"))
        elif not job.params.HasField("max_tokens") and job.params.min_tokens > model.default_max_tokens:
            violations.append(Violation("job.params.min_tokens", f"must be at most {model.default_max_tokens}"))
        form = job.params.WhichOneof("structured_output")
        if form is not None and not model.structured_output:
            violations.append(Violation(f"job.params.{form}", f"is not supported by the model {model.name}"))
        if job.HasField("prompt_file"):
            # See services.gateway.prompt_files.
            return violations
        if not violations and (prompts := self._prompts.get(model.name)) is not None:
            violations += await prompts.check(job, None if model.price is None else model.price.message())
        return violations

    def max_prompt_bytes(self, name: str) -> int | None:
        """Return the maximum size of a prompt of a model, in bytes; None where it is not known."""
        prompts = self._prompts.get(name)
        return None if prompts is None else prompts.max_bytes

    async def infos(self, client: Client, tenant: str, serves: Callable[[str], bool]) -> list[llm_pb2.ModelInfo]:
        """Return every model of a tenant with the state of its queues. Raises RPCError if Temporal is unavailable.

        `serves` returns whether a worker of a queue reports itself.
        """
        own = [self._models[name] for name in self._names(tenant)]
        return await asyncio.gather(*(self._info(client, model, serves) for model in own))

    def _names(self, tenant: str) -> list[str]:
        return [model.name for model in self._models.values() if _is_of(model, tenant)]

    async def _info(self, client: Client, model: Model, serves: Callable[[str], bool]) -> llm_pb2.ModelInfo:
        waiting, background = await asyncio.gather(
            *(self.queue_state(client, queue) for queue in (model.queue, background_queue(model)))
        )
        of_classes = [(job_class, background if is_background(job_class) else waiting) for job_class in NAMES]
        return llm_pb2.ModelInfo(
            name=model.name,
            context_tokens=model.context_tokens,
            max_output_tokens=model.max_output_tokens,
            default_max_tokens=model.default_max_tokens,
            structured_output=model.structured_output,
            # A worker of an earlier version polls this queue alone. A full worker does not poll.
            available=waiting.available or serves(model.queue),
            backlog=waiting.backlog + background.backlog,
            classes=[
                llm_pb2.ModelClass(
                    job_class=job_class,
                    backlog=state.backlog,
                    estimated_wait=state.estimated_wait,
                    weight=self._classes.of(job_class).weight,
                )
                for job_class, state in of_classes
            ],
            price=None if model.price is None else model.price.message(),
            image_sizes=model.image_messages(),
        )

    async def queue_info(self, client: Client, queue: str) -> llm_pb2.QueueInfo | None:
        """Return what a waiting job shows of its queue; None when Temporal does not answer."""
        try:
            state = await self.queue_state(client, queue)
        except RPCError:
            return None
        return llm_pb2.QueueInfo(backlog=state.backlog, estimated_wait=state.estimated_wait)

    async def queue_state(self, client: Client, queue: str) -> QueueState:
        """Return the queue's state, at most a second old. Raises RPCError when Temporal is unavailable."""
        read_at, state = self._states.get(queue, (0.0, None))
        if state is not None and time.monotonic() - read_at < _CACHE_SECONDS:
            return state
        return await self._calls.joined(queue, lambda: self._describe(client, queue))

    async def _describe(self, client: Client, queue: str) -> QueueState:
        response = await client.workflow_service.describe_task_queue(
            DescribeTaskQueueRequest(
                namespace=client.namespace,
                task_queue=TaskQueue(name=queue),
                task_queue_type=TaskQueueType.TASK_QUEUE_TYPE_ACTIVITY,
                report_stats=True,
            ),
            timeout=RPC_TIMEOUT,
        )
        oldest = datetime.now(UTC) - _POLLER_FRESH
        state = QueueState(
            available=any(poller.last_access_time.ToDatetime(UTC) > oldest for poller in response.pollers),
            backlog=response.stats.approximate_backlog_count,
            dispatch_rate=response.stats.tasks_dispatch_rate,
        )
        self._states[queue] = (time.monotonic(), state)
        return state


def _is_of(model: Model, tenant: str) -> bool:
    return model.tenant in (None, tenant)


def background_queue(model: Model) -> str:
    """Return the task queue of the model's background jobs."""
    return queue_of(model.queue, common_pb2.JOB_CLASS_BACKGROUND)
