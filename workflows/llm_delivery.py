"""LLMDeliveryWorkflow: continues a job's deliveries after the job has closed, for days if need be.

It is a workflow of its own, because a client that waits for the job's result must not wait for a receiver that is down.
LLMJobWorkflow starts it as a child that outlives its parent. The RPC Redeliver starts it, or signals it if it runs.
"""

import asyncio

from temporalio import workflow

with workflow.unsafe.imports_passed_through():
    from jobs import errors, names
    from jobs.inputs import one_input
    from llm_pb import internal_pb2, llm_pb2

from workflows.deliveries import DeliveryLoops


@workflow.defn(name=names.DELIVERY_WORKFLOW_TYPE)
class LLMDeliveryWorkflow:
    """Ends when every delivery is settled. Its state, with the log of deliveries, can be queried after that as well."""

    @workflow.init
    @one_input
    def __init__(self, state: internal_pb2.DeliveryState | None = None) -> None:
        # A workflow that was started by hand without exactly one input has nothing to deliver.
        self._deliveries = DeliveryLoops(state if state is not None else internal_pb2.DeliveryState())

    @workflow.run
    @one_input
    async def run(self, state: internal_pb2.DeliveryState | None = None) -> None:
        """Run the pending deliveries, and those that Redeliver asks for meanwhile."""
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
    def get_deliveries(self) -> internal_pb2.DeliveryState:
        """Return the state of the deliveries."""
        return self._deliveries.state


def _too_long() -> bool:
    """Return whether to continue in a new run, because each attempt adds the event to the history."""
    return workflow.info().is_continue_as_new_suggested()
