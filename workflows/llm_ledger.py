"""LLMLedgerWorkflow: the open jobs of one tenant that has a quota for them. Each holds a slot.

    gateway ──update Reserve──▶ a slot, or none ──▶ gateway starts the job
    job ──its outcome is settled: ForgetFeed──signal Release──▶ the slot is free

A slot is bound to the job's workflow id, so that a job never holds two. Only the end of its job frees a slot: nobody
who has reserved one can know that no other gateway is about to start the same job. A slot whose job cannot release it
is found by a check, which asks Temporal about the jobs that were asked about longest ago:

- The job was terminated, deleted, or ended by Temporal with its total time: it is closed or unknown.
- The gateway died between reservation and start: the job is unknown, and its reservation is older than any start under
  way.

A check runs when a Reserve would be refused, and now and then. A Reserve that is refused without one costs no event,
because the update's validator refuses it.
"""

from datetime import UTC, datetime, timedelta
from typing import Final

from temporalio import workflow
from temporalio.common import RetryPolicy
from temporalio.exceptions import ActivityError, ApplicationError

with workflow.unsafe.imports_passed_through():
    from jobs import names
    from jobs.inputs import one_input
    from jobs.options import duration
    from llm_pb import internal_pb2

from workflows import activities

_MAX_UPDATES: Final = 1000
_START_TIMEOUT: Final = timedelta(minutes=1)
_CHECK_INTERVAL: Final = timedelta(seconds=10)
_IDLE_CHECK_INTERVAL: Final = timedelta(minutes=10)
"""Time between two checks that no Reserve asks for."""
_MAX_CHECKED: Final = 100
"""Maximum number of jobs that a check asks about. It runs within a workflow task, for which Reserve has to wait."""
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
        self._slots = {slot.workflow_id: slot.reserve_time.ToDatetime(UTC) for slot in (state.slots if state else ())}
        """When the slot of each job was last reserved. The job that was checked longest ago comes first."""
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
        if self._refuses_some(request) and self._check_is_due():
            await self._check()
        response = internal_pb2.ReserveResponse()
        for id_ in request.workflow_ids:
            if id_ in self._slots or len(self._slots) < request.limit:
                self._slots[id_] = workflow.now()
            else:
                response.refused.append(id_)
        return response

    @reserve.validator
    @one_input
    def _validate_reserve(self, request: internal_pb2.ReserveRequest | None = None) -> None:
        """Refuse a Reserve that would change nothing, which spares the history its events."""
        if request is None:
            raise ApplicationError(_NO_INPUT)
        some_have_slots = any(id_ in self._slots for id_ in request.workflow_ids)
        if not some_have_slots and len(self._slots) >= request.limit and not self._check_is_due():
            raise ApplicationError("no slot is free", type=names.QUOTA_REACHED)

    @workflow.signal(name=names.SIGNAL_RELEASE)
    @one_input
    def release(self, request: internal_pb2.ReleaseRequest | None = None) -> None:
        """Free the slots of jobs."""
        for id_ in request.workflow_ids if request else ():
            self._slots.pop(id_, None)

    @workflow.query(name=names.QUERY_GET_LEDGER)
    def get_ledger(self) -> internal_pb2.LedgerState:
        """Return the slots in use."""
        return self._state()

    @workflow.query(name=names.QUERY_COUNT_SLOTS)
    def count_slots(self) -> int:
        """Return the number of slots in use, without their ids."""
        return len(self._slots)

    def _refuses_some(self, request: internal_pb2.ReserveRequest) -> bool:
        new = {id_ for id_ in request.workflow_ids if id_ not in self._slots}
        return len(self._slots) + len(new) > request.limit

    def _check_is_due(self) -> bool:
        return bool(self._slots) and workflow.now() >= self._next_check

    async def _check(self) -> None:
        """Free the slots of some jobs that no longer need them."""
        now = workflow.now()
        self._next_check = now + self._settings.check_interval.ToTimedelta()
        checked = [*self._slots][:_MAX_CHECKED]
        try:
            found = await workflow.execute_local_activity(
                activities.find_ended_jobs,
                internal_pb2.FindEndedJobsRequest(workflow_ids=checked),
                start_to_close_timeout=timedelta(seconds=30),
                retry_policy=RetryPolicy(maximum_attempts=1),
            )
        except ActivityError:
            # The next check asks again.
            return
        no_start_since = now - self._settings.start_timeout.ToTimedelta()
        ended = {*found.ended, *(id_ for id_ in found.missing if self._reserved(id_, now) <= no_start_since)}
        for id_ in checked:
            if (reserved := self._slots.pop(id_, None)) is not None and id_ not in ended:
                self._slots[id_] = reserved

    def _reserved(self, id_: str, otherwise: datetime) -> datetime:
        return self._slots.get(id_, otherwise)

    def _too_long(self) -> bool:
        """Return whether to continue in a new run."""
        return self._updates >= self._settings.max_updates or workflow.info().is_continue_as_new_suggested()

    def _state(self) -> internal_pb2.LedgerState:
        state = internal_pb2.LedgerState()
        state.CopyFrom(self._settings)
        for id_, reserved in self._slots.items():
            state.slots.add(workflow_id=id_).reserve_time.FromDatetime(reserved)
        return state
