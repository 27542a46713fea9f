"""The services of the contract by their methods, whose names are unique."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Final

from llm_pb import batch_pb2, file_pb2, llm_pb2, pipeline_pb2, schedule_pb2

if TYPE_CHECKING:
    from google.protobuf.descriptor import ServiceDescriptor

SERVICE_OF: "Final[Mapping[str, ServiceDescriptor]]" = {
    method.name: service
    for module in (llm_pb2, batch_pb2, file_pb2, pipeline_pb2, schedule_pb2)
    for service in module.DESCRIPTOR.services_by_name.values()
    for method in service.methods
}
"""The service of each method."""
