"""A client of Temporal for what a schedule holds: the SDK encrypts it for the tenant of a workflow, and a schedule is
none."""

from temporalio.client import Client
from temporalio.converter import WorkflowSerializationContext


def client_for(client: Client, id_: str) -> Client:
    """Return a client whose payloads are those of the workflows whose ids belong to the tenant of this id."""
    config = client.config()
    context = WorkflowSerializationContext(namespace=client.namespace, workflow_id=id_)
    config["data_converter"] = client.data_converter.with_context(context)
    return Client(**config)
