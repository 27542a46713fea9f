"""What belongs to a job, in one list: whatever is stored for a job has a part here that removes it.

A part is removed as often as needed until nothing is left, by whichever gateway is alive.
"""

from collections.abc import Callable, Collection, Iterable
from typing import Final, Protocol

from feed.answers import Answers
from feed.feed import Feed
from jobs import names
from jobs.ids import delivery_workflow_ids
from llm_pb import internal_pb2, llm_pb2
from services.gateway.files.outputs import OutputPart
from services.gateway.runs import Runs
from store.store import Store


class JobPart(Protocol):
    """A part of a closed job."""

    @property
    def name(self) -> "llm_pb2.JobPart.ValueType":
        """Which part it is."""
        ...

    async def remove(self, job: internal_pb2.JobRemains) -> bool:
        """Remove what is there; return whether nothing is left. Raises RPCError when Temporal is unavailable."""
        ...


class FeedRecords:
    """The records of all of the job's runs in the live feed, and its answer in the cache of answers."""

    name: Final = llm_pb2.JOB_PART_FEED

    def __init__(self, feed: Feed, answers: Answers) -> None:
        self._feed = feed
        self._answers = answers

    async def remove(self, job: internal_pb2.JobRemains) -> bool:
        """See JobPart."""
        keys = [run.run_id for run in job.runs if run.workflow_id == job.workflow_id]
        gone = [await self._feed.remove(key) for key in keys]
        # NATS of an earlier version may not permit it, where no job can have used the cache.
        return all(gone) and (not job.cached or await self._answers.store.forget(job.workflow_id))


class Workflows:
    """The runs of the workflows of some types that belong to the job: not the tombstone under the job's id."""

    def __init__(
        self,
        name: "llm_pb2.JobPart.ValueType",
        runs: Runs,
        kinds: Collection[str],
        ids: Callable[[str], Iterable[str]],
    ) -> None:
        """`ids` returns the workflow ids that belong to a job's id."""
        self.name = name
        self._runs = runs
        self._kinds = kinds
        self._ids = ids

    async def remove(self, job: internal_pb2.JobRemains) -> bool:
        """See JobPart."""
        gone = True
        for id_ in self._ids(job.workflow_id):
            known = {run.run_id for run in job.runs if run.workflow_id == id_}
            gone &= await self._runs.delete(id_, self._kinds, known)
        return gone


def parts_of(runs: Runs, feed: Feed, answers: Answers, store: Store | None) -> tuple[JobPart, ...]:
    """Return all that belongs to a job, pipeline or batch.

    Its workflow comes last, because it says what else there is.
    """
    kinds = (names.JOB_WORKFLOW_TYPE, names.PIPELINE_WORKFLOW_TYPE, names.BATCH_WORKFLOW_TYPE)
    return (
        FeedRecords(feed, answers),
        *([] if store is None else [OutputPart(store)]),
        Workflows(llm_pb2.JOB_PART_DELIVERIES, runs, (names.DELIVERY_WORKFLOW_TYPE,), delivery_workflow_ids),
        Workflows(llm_pb2.JOB_PART_WORKFLOW, runs, kinds, _itself),
    )


def _itself(job_workflow_id: str) -> list[str]:
    return [job_workflow_id]
