"""LLMLedgerWorkflow: the open jobs of one tenant that has a quota for them or for output tokens. Each holds a slot.

    gateway ──update Reserve──▶ a slot, or none ──▶ gateway starts the job
    job ──its outcome is settled: ForgetFeed──signal Release──▶ the slot is free

A slot holds the output tokens that the job may generate. What the job has used counts on the UTC day on which the slot
is released; the rest is free again. A batch without a budget holds none at first and leases them as it needs them, by
the update Lease. With each lease it tells what it has used, which counts from then on.

A ledger of files holds no slots: see workflows.counted_files.

A slot is bound to the job's workflow id, so that a job never holds two: see workflows.ledger_slots. Only the end of its
job frees a slot: nobody who has reserved one can know that no other gateway is about to start the same job. A check
finds a slot whose job cannot release it. It asks Temporal about the jobs that were asked about longest ago:

- The job was terminated, deleted, or ended by Temporal with its total time: it is closed or unknown.
- The gateway died between reservation and start: the job is unknown, or it is a pipeline's earlier run that is closed,
  and the reservation is older than any start under way.

A check runs when a Reserve would be refused, and now and then. A Reserve that is refused without one costs no event,
because the update's validator refuses it.
"""

from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from typing import Final

from temporalio import workflow
from temporalio.common import RetryPolicy
from temporalio.exceptions import ApplicationError, FailureError

with workflow.unsafe.imports_passed_through():
    from jobs import names
    from jobs.ids import is_batch, is_pipeline
    from jobs.inputs import one_input
    from jobs.options import duration
    from llm_pb import internal_pb2

from workflows import activities
from workflows.counted_files import CountedFiles
from workflows.ledger_slots import Slot, Slots
from workflows.ordered_activities import start_in_order

_MAX_UPDATES: Final = 1000
_START_TIMEOUT: Final = timedelta(minutes=1)
_CHECK_INTERVAL: Final = timedelta(seconds=10)
_IDLE_CHECK_INTERVAL: Final = timedelta(minutes=10)
"""Time between two checks that no Reserve asks for."""
_CHECK_TIMEOUT: Final = timedelta(seconds=30)
_MAX_CHECKED: Final = 100
"""Maximum number of jobs that a check asks about. Reserve waits for the check."""
_LEAST_LEASES: Final = 4
"""Number of leases that are left for others where a batch could use all."""
_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)
_NO_INPUT: Final = "Reserve takes one ReserveRequest"


@workflow.defn(name=names.LEDGER_WORKFLOW_TYPE)
class LLMLedgerWorkflow:
    """Runs for ever, in one run after another."""

    @workflow.init
    @one_input
    def __init__(self, state: internal_pb2.LedgerState | None = None) -> None:
        self._settings = internal_pb2.LedgerState(
            max_updates=_MAX_UPDATES,
            start_timeout=duration(_START_TIMEOUT),
            check_interval=duration(_CHECK_INTERVAL),
        )
        if state is not None:
            for name in ("start_timeout", "check_interval"):
                if state.HasField(name):
                    getattr(self._settings, name).CopyFrom(getattr(state, name))
            self._settings.max_updates = state.max_updates or _MAX_UPDATES
        self._slots = Slots(state)
        self._day, self._used_tokens = (state.day, state.used_tokens) if state else (0, 0)
        self._files = CountedFiles(state.files, state.files_version) if state else CountedFiles()
        self._updates = 0
        self._next_check = workflow.now()

    @workflow.run
    @one_input
    async def run(self, state: internal_pb2.LedgerState | None = None) -> None:
        """Check now and then, and continue in a new run before Temporal accepts no more updates in this one."""
        while not self._too_long():
            await workflow.wait_condition(lambda: bool(self._slots) or self._too_long())
            try:
                await workflow.wait_condition(self._too_long, timeout=_IDLE_CHECK_INTERVAL)
            except TimeoutError:
                await self._check()
        await workflow.wait_condition(workflow.all_handlers_finished)
        workflow.continue_as_new(self._state())

    @workflow.update(name=names.UPDATE_RESERVE)
    @one_input
    async def reserve(self, request: internal_pb2.ReserveRequest | None = None) -> internal_pb2.ReserveResponse:
        """Give each job a slot that has one already, or for which there is room."""
        if request is None:
            raise ApplicationError(_NO_INPUT)
        self._updates += 1
        if self._refusals(request) and self._check_is_due():
            await self._check()
        refusals = self._refusals(request)
        numbers = _numbers(request.workflow_ids, request.reservations)
        for (id_, tokens), number in zip(_asked(request), numbers, strict=False):
            if id_ not in refusals:
                self._slots.reserve(id_, number, tokens, workflow.now())
        return internal_pb2.ReserveResponse(
            refused=refusals,
            refused_by_reserved_tokens=[id_ for id_, why in refusals.items() if why == names.TOKENS_RESERVED],
            refused_by_used_tokens=[id_ for id_, why in refusals.items() if why == names.TOKENS_USED],
        )

    @reserve.validator
    @one_input
    def _validate_reserve(self, request: internal_pb2.ReserveRequest | None = None) -> None:
        """Refuse a Reserve that would change nothing, which spares the history its events."""
        if request is None:
            raise ApplicationError(_NO_INPUT)
        refusals = self._refusals(request)
        if len(refusals) == len({*request.workflow_ids}) and not self._check_is_due():
            reasons = {*refusals.values()}
            if len(reasons) == 1:
                raise ApplicationError("no slot is free", type=reasons.pop())

    @workflow.update(name=names.UPDATE_LEASE)
    @one_input
    async def lease(self, request: internal_pb2.LeaseRequest | None = None) -> internal_pb2.LeaseResponse:
        """Count what a batch has used, and reserve further tokens for it. A repeat of a lost answer reserves them once.

        The lease is at most a quarter of what is free, unless the batch needs more, so that others get their share.
        """
        if request is None:
            raise ApplicationError("Lease takes one LeaseRequest")
        self._updates += 1
        id_ = request.workflow_id
        (number,) = _numbers([id_], [request.reservation])
        if self._slots.was_released(id_, number) and workflow.patched(names.PATCH_RELEASED_LEASES):
            # It has ended while this was under way, and nothing would free a slot soon.
            return internal_pb2.LeaseResponse()
        if not self._lease_of(request, number) and self._check_is_due():
            await self._check()
            if self._slots.was_released(id_, number) and workflow.patched(names.PATCH_CHECKED_LEASES):
                return internal_pb2.LeaseResponse()
        slot = self._slots.get(id_, number) or Slot(workflow.now(), 0, request.used_tokens)
        self._count(max(request.used_tokens - slot.settled, 0))
        settled = max(request.used_tokens, slot.settled)
        self._slots.put(id_, number, Slot(slot.reserved_at, request.held_tokens, settled))
        leased = self._lease_of(request, number)
        self._slots.put(id_, number, Slot(slot.reserved_at, request.held_tokens + leased, settled))
        never = (
            not leased and request.alone and request.held_tokens + request.least_tokens > request.output_tokens_limit
        )
        return internal_pb2.LeaseResponse(leased_tokens=leased, never=never)

    @lease.validator
    @one_input
    def _validate_lease(self, request: internal_pb2.LeaseRequest | None = None) -> None:
        if request is None:
            raise ApplicationError("Lease takes one LeaseRequest")

    @workflow.update(name=names.UPDATE_COUNT_FILES)
    @one_input
    def count_files(self, request: internal_pb2.CountFilesRequest | None = None) -> internal_pb2.CountFilesResponse:
        """Count files, unless the gateway does not know what was counted before: see CountFilesRequest."""
        if request is None:
            raise ApplicationError("CountFiles takes one CountFilesRequest")
        self._updates += 1
        ledger = workflow.info().first_execution_run_id
        return self._files.count(request, ledger, workflow.now(), lambda: workflow.patched(names.PATCH_SKEWED_FILES))

    @workflow.signal(name=names.SIGNAL_RELEASE)
    @one_input
    def release(self, request: internal_pb2.ReleaseRequest | None = None) -> None:
        """Free the slots of jobs, and count what they have used."""
        if request is not None:
            known = len(request.output_tokens) == len(request.workflow_ids)
            for index, number in enumerate(_numbers(request.workflow_ids, request.reservations)):
                id_ = request.workflow_ids[index]
                self._count(self._slots.free(id_, number, request.output_tokens[index] if known else None))
                if is_batch(id_) or is_pipeline(id_):
                    self._slots.note_release(id_, number)

    @workflow.query(name=names.QUERY_GET_LEDGER)
    def get_ledger(self) -> internal_pb2.LedgerState:
        """Return the slots in use."""
        return self._state()

    @workflow.query(name=names.QUERY_COUNT_SLOTS)
    def count_slots(self) -> int:
        """Return the number of slots in use, without their ids."""
        return len(self._slots)

    @workflow.query(name=names.QUERY_GET_USAGE)
    def get_usage(self) -> internal_pb2.LedgerUsage:
        """Return the slots and tokens in use, as numbers."""
        return internal_pb2.LedgerUsage(
            slots=len(self._slots),
            reserved_tokens=self._slots.reserved_tokens(),
            day=self._day,
            used_tokens=self._used_tokens,
        )

    def _refusals(self, request: internal_pb2.ReserveRequest) -> dict[str, str]:
        """Return the jobs that cannot get a slot now, and for each the type of error that says why. Changes nothing."""
        refusals: dict[str, str] = {}
        given, reserved = {*self._slots}, self._slots.reserved_tokens()
        used = self._used_tokens if self._day == _today() else 0
        for id_, tokens in _asked(request):
            if id_ in given:
                continue
            if len(given) >= request.limit:
                refusals[id_] = names.QUOTA_REACHED
            elif request.HasField("output_tokens_limit") and used + reserved + tokens > request.output_tokens_limit:
                tomorrow = used + tokens > request.output_tokens_limit
                refusals[id_] = names.TOKENS_USED if tomorrow else names.TOKENS_RESERVED
            else:
                given.add(id_)
                reserved += tokens
        return refusals

    def _lease_of(self, request: internal_pb2.LeaseRequest, number: int) -> int:
        """Return how many tokens there are for a batch now, beyond what it holds. Changes nothing."""
        if not request.HasField("output_tokens_limit"):
            return request.wanted_tokens
        slot = self._slots.get(request.workflow_id, number) or Slot(workflow.now(), 0, request.used_tokens)
        used = self._used_tokens if self._day == _today() else 0
        used += max(request.used_tokens - slot.settled, 0)
        others = self._slots.reserved_tokens() - slot.output_tokens
        free = request.output_tokens_limit - used - others - request.held_tokens
        if free < request.least_tokens:
            return 0
        return min(max(request.least_tokens, free // _LEAST_LEASES), max(request.wanted_tokens, request.least_tokens))

    def _count(self, tokens: int) -> None:
        """Count tokens as used today."""
        if self._day != (today := _today()):
            self._day, self._used_tokens = today, 0
        self._used_tokens += tokens

    def _check_is_due(self) -> bool:
        return bool(self._slots) and workflow.now() >= self._next_check

    async def _check(self) -> None:
        """Free the slots of some jobs that no longer need them."""
        now = workflow.now()
        self._next_check = now + self._settings.check_interval.ToTimedelta()
        checked = [*self._slots][:_MAX_CHECKED]
        try:
            found = await start_in_order(
                activities.find_ended_jobs,
                internal_pb2.FindEndedJobsRequest(workflow_ids=checked),
                schedule_to_close_timeout=_CHECK_TIMEOUT,
                start_to_close_timeout=_CHECK_TIMEOUT,
                retry_policy=RetryPolicy(maximum_attempts=1),
            )
        except FailureError:
            if not workflow.patched(names.PATCH_FAILED_CHECKS):
                raise
            # The next check asks again.
            return
        no_start_since = now - self._settings.start_timeout.ToTimedelta()
        for index, id_ in enumerate(found.ended):
            used = found.output_tokens[index] if index < len(found.output_tokens) else -1
            number = found.reservations[index] if index < len(found.reservations) else 0
            self._count(self._slots.free(id_, number, None if used < 0 else used))
            # A pipeline that has ended may be about to start again.
            self._slots.free_unstarted(id_, no_start_since)
        for id_ in found.missing:
            self._slots.free_unstarted(id_, no_start_since)
        for id_ in checked:
            self._slots.move_to_end(id_)

    def _too_long(self) -> bool:
        """Return whether to continue in a new run."""
        return self._updates >= self._settings.max_updates or workflow.info().is_continue_as_new_suggested()

    def _state(self) -> internal_pb2.LedgerState:
        state = internal_pb2.LedgerState()
        state.CopyFrom(self._settings)
        state.day, state.used_tokens = self._day, self._used_tokens
        self._slots.save(state)
        self._files.save(state)
        return state


def _asked(request: internal_pb2.ReserveRequest) -> list[tuple[str, int]]:
    """Return the jobs of a request, each with the output tokens to reserve."""
    tokens = [*request.output_tokens] or [0] * len(request.workflow_ids)
    return list(zip(request.workflow_ids, tokens, strict=False))


def _numbers(ids: Sequence[str], reservations: Sequence[int]) -> Sequence[int]:
    """Return the reservation of each id; 0 where its sender, or the version that this run began with, knows none."""
    if any(reservations) and len(reservations) == len(ids) and workflow.patched(names.PATCH_RESERVATIONS):
        return reservations
    return [0] * len(ids)


def _today() -> int:
    """Return the number of UTC days since 1970-01-01."""
    return (workflow.now() - _EPOCH).days
