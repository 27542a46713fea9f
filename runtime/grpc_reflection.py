"""Server reflection in both of its versions: v1alpha, which the library has, and v1, which newer clients ask for first.

The messages of the two are the same on the wire; only the package's name differs.
"""

from collections.abc import Sequence
from typing import Final

import grpc
from google.protobuf import descriptor_pool
from google.protobuf.descriptor_pb2 import FileDescriptorProto
from grpc_reflection.v1alpha import reflection
from grpc_reflection.v1alpha.reflection_pb2 import DESCRIPTOR, ServerReflectionRequest, ServerReflectionResponse

_ALPHA_PACKAGE: Final = DESCRIPTOR.package
_V1_PACKAGE: Final = "grpc.reflection.v1"
_V1_FILE: Final = "grpc/reflection/v1/reflection.proto"
_V1_SERVICE: Final = f"{_V1_PACKAGE}.ServerReflection"


def add_reflection(services: Sequence[str], server: grpc.aio.Server) -> None:
    """Serve the descriptions of the named services, and of reflection itself, by both versions."""
    _describe_v1()
    names = (*services, reflection.SERVICE_NAME, _V1_SERVICE)
    reflection.enable_server_reflection(names, server)
    servicer = reflection.aio.ReflectionServicer(names)
    handler = grpc.stream_stream_rpc_method_handler(
        servicer.ServerReflectionInfo,
        request_deserializer=ServerReflectionRequest.FromString,
        response_serializer=ServerReflectionResponse.SerializeToString,
    )
    handlers = grpc.method_handlers_generic_handler(_V1_SERVICE, {"ServerReflectionInfo": handler})
    server.add_generic_rpc_handlers((handlers,))


def _describe_v1() -> None:
    """Add the description of v1 to the pool that reflection reads: clients ask for every listed service."""
    v1 = FileDescriptorProto()
    DESCRIPTOR.CopyToProto(v1)
    v1.name, v1.package = _V1_FILE, _V1_PACKAGE
    for message in v1.message_type:
        for field in message.field:
            if field.type_name:
                field.type_name = _renamed(field.type_name)
    for method in v1.service[0].method:
        method.input_type, method.output_type = _renamed(method.input_type), _renamed(method.output_type)
    # A process with several servers adds it again, which changes nothing.
    descriptor_pool.Default().AddSerializedFile(v1.SerializeToString())


def _renamed(type_name: str) -> str:
    return type_name.replace(f".{_ALPHA_PACKAGE}.", f".{_V1_PACKAGE}.")
