"""LLMDeliveryWorkflow: goes on with a job's deliveries after the job has closed, for days if need be.

A workflow of its own, because whoever waits for the job's result must not wait for a receiver that is down.
LLMJobWorkflow starts it as a child that outlives its parent; Redeliver starts it, or wakes it, from the API.
"""

import asyncio

from temporalio import workflow

with workflow.unsafe.imports_passed_through():
    from jobs import errors, names
    from jobs.inputs import one_input
    from llm_pb import llm_pb2

from workflows.deliveries import Deliveries


@workflow.defn(name=names.DELIVERY_WORKFLOW_TYPE)
class LLMDeliveryWorkflow:
    """Ends when every delivery is settled. Its state, the log of deliveries included, can be asked for ever after."""

    @workflow.init
    @one_input
    def __init__(self, state: llm_pb2.DeliveryState | None = None) -> None:
        # Started by hand without one input, it has nothing to deliver.
        self._deliveries = Deliveries(state if state is not None else llm_pb2.DeliveryState())

    @workflow.run
    @one_input
    async def run(self, state: llm_pb2.DeliveryState | None = None) -> None:
        """Deliver what is pending, and what is asked for meanwhile."""
        self._deliveries.start()
        try:
            await workflow.wait_condition(lambda: self._deliveries.idle() or _too_long())
            if not self._deliveries.idle():
                self._deliveries.pause()
                await workflow.wait_condition(self._deliveries.idle)
                workflow.continue_as_new(self._deliveries.state)
        except asyncio.CancelledError:
            self._deliveries.stop(errors.Cancelled(workflow.cancellation_reason() or "cancelled by an operator"))
            raise

    @workflow.signal(name=names.SIGNAL_REDELIVER)
    @one_input
    def redeliver(self, request: llm_pb2.RedeliverRequest | None = None) -> None:
        """Send deliveries again."""
        self._deliveries.state.redeliver_time.FromDatetime(workflow.now())
        self._deliveries.send_again(request.delivery_ids if request else ())

    @workflow.query(name=names.QUERY_GET_DELIVERIES)
    def get_deliveries(self) -> llm_pb2.DeliveryState:
        """Return how the deliveries stand."""
        return self._deliveries.state


def _too_long() -> bool:
    """Return whether the history should go on in a new run: each attempt adds the event to it."""
    return workflow.info().is_continue_as_new_suggested()
