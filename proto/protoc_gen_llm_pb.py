"""Plugin of `buf generate` that generates the package `llm_pb` from the files of `proto/`.

The compiler names a Python module after the path of its proto file. `proto/llm.proto` lies at the root of buf's module,
so the stock plugins would generate a top-level `llm_pb2` that no package contains. This plugin gives the file the
virtual path `llm_pb/llm.proto`. `grpc_tools.protoc` and mypy-protobuf then generate messages, type stubs, and the gRPC
stubs of the files that have a service.

The plugin reads a CodeGeneratorRequest from stdin and writes a CodeGeneratorResponse to stdout.
"""

import sys
import tempfile
from pathlib import Path

from google.protobuf.compiler import plugin_pb2
from google.protobuf.descriptor_pb2 import FileDescriptorSet
from grpc_tools import protoc

PACKAGE = "llm_pb"
_INIT = '"""Generated from proto/ by `make generate`: never edited by hand."""\n'


def generate(request: plugin_pb2.CodeGeneratorRequest) -> plugin_pb2.CodeGeneratorResponse:
    """Return the files of the package. `error` is set when the compiler failed; its own messages go to stderr."""
    virtual = {name: f"{PACKAGE}/{name}" for name in request.file_to_generate}
    files = FileDescriptorSet(file=request.proto_file)
    for file in files.file:
        file.name = virtual.get(file.name, file.name)
        file.dependency[:] = [virtual.get(name, name) for name in file.dependency]
    with_service = {Path(file.name).stem for file in files.file if file.service}
    response = plugin_pb2.CodeGeneratorResponse(
        supported_features=plugin_pb2.CodeGeneratorResponse.FEATURE_PROTO3_OPTIONAL
    )
    with tempfile.TemporaryDirectory() as directory:
        descriptors = Path(directory, "files.binpb")
        out = Path(directory, "out")
        out.mkdir()
        descriptors.write_bytes(files.SerializeToString())
        status = protoc.main(
            [
                "protoc",
                f"--descriptor_set_in={descriptors}",
                f"--python_out={out}",
                f"--grpc_python_out={out}",
                f"--mypy_out=quiet:{out}",
                f"--mypy_grpc_out=quiet,only_async:{out}",
                *virtual.values(),
            ]
        )
        if status != 0:
            response.error = f"grpc_tools.protoc ended with status {status}"
            return response
        response.file.add(name=f"{PACKAGE}/__init__.py", content=_INIT)
        response.file.add(name=f"{PACKAGE}/py.typed", content="")
        for path in sorted(out.rglob("*.py*")):
            stem, _, kind = path.name.partition("_pb2")
            if kind.startswith("_grpc") and stem not in with_service:
                continue
            response.file.add(name=str(path.relative_to(out)), content=path.read_text())
    return response


if __name__ == "__main__":
    sys.stdout.buffer.write(
        generate(plugin_pb2.CodeGeneratorRequest.FromString(sys.stdin.buffer.read())).SerializeToString()
    )
