"""Toolchains of other languages: the system's, or unpacked from Debian's packages by `make tools` and the like."""

import os
import shutil
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.support.commands import run
from tests.support.paths import ROOT

TOOLS = ROOT / ".tools"
RUBY = ROOT / "clients" / "ruby"
GO = ROOT / "clients" / "go"
CPP = ROOT / "clients" / "cpp"
JAVA = ROOT / "clients" / "java"
JARS = (TOOLS / "usr" / "share" / "java", Path("/usr/share/java"))
CLASSES = (
    *("grpc-api", "grpc-context", "grpc-core", "grpc-netty", "grpc-protobuf", "grpc-protobuf-lite", "grpc-stub"),
    *("protobuf", "protobuf-util", "proto-google-common-protos", "gson", "guava", "geronimo-annotation-1.3-spec"),
    *("netty-buffer", "netty-codec", "netty-codec-http", "netty-codec-http2", "netty-codec-socks", "netty-common"),
    *("netty-handler", "netty-handler-proxy", "netty-resolver", "netty-transport", "perfmark-api", "perfmark-impl"),
)
"""What the Java example needs of Debian's packages."""
INCLUDES = ("proto", "third_party/googleapis")
PROTOS = ("common.proto", "llm.proto")
"""The contract of jobs, and what it imports of ours."""


def unpacked() -> tuple[str, ...]:
    """Return the start of a command that finds the libraries and Ruby's packages in `.tools`."""
    (libraries,) = (TOOLS / "usr" / "lib").glob("*-linux-gnu")
    gems = libraries / "rubygems-integration"
    ruby = (
        *(TOOLS / "usr" / "lib" / "ruby").glob("3.*"),
        *(libraries / "ruby").glob("3.*"),
        TOOLS / "usr" / "lib" / "ruby" / "vendor_ruby",
        *gems.glob("*/extensions/*/*/*"),
        # The gem of gRPC has the folders of its source.
        *gems.glob("*/gems/grpc-*/src/ruby/*"),
        *gems.glob("*/gems/*/lib"),
        *(TOOLS / "usr" / "share" / "rubygems-integration").glob("*/gems/*/lib"),
    )
    return ("env", f"LD_LIBRARY_PATH={libraries}", f"RUBYLIB={':'.join(map(str, ruby))}")


def program(name: str) -> str | None:
    """Return the path of a program in `.tools`, or of the system's, which `make tools` does not fetch again."""
    return shutil.which(name, path=f"{TOOLS / 'usr' / 'bin'}:{os.defpath}")


async def ruby_example(folder: Path) -> Sequence[str]:
    """Return the command of the Ruby example, whose code is generated into the folder. Skips the test without Ruby."""
    interpreters = [path for path in (TOOLS / "usr" / "bin").glob("ruby*") if path.exists()]
    plugin = program("grpc_ruby_plugin")
    if not interpreters or plugin is None:
        pytest.skip("Ruby with gRPC is not there: make tools")
    environment = unpacked()
    await generate(
        environment, folder, f"--plugin=protoc-gen-grpc={plugin}", f"--ruby_out={folder}", f"--grpc_out={folder}"
    )
    return (*environment, str(interpreters[0]), "--disable-gems", f"-I{folder}", str(RUBY / "client.rb"))


async def go_example(folder: Path) -> Sequence[str]:
    """Return the command of the Go example, which is built in the folder as a GOPATH. Skips the test without Go."""
    roots = sorted((TOOLS / "usr" / "lib").glob("go-1.*"))
    plugins = [TOOLS / "usr" / "bin" / name for name in ("protoc-gen-go", "protoc-gen-go-grpc")]
    if not roots or not all(plugin.exists() for plugin in plugins):
        pytest.skip("Go with gRPC is not there: make tools-go")
    (folder / "src" / "client").mkdir(parents=True)
    shutil.copy(GO / "client.go", folder / "src" / "client")
    options = [f"--plugin={plugin}" for plugin in plugins]
    await generate(unpacked(), folder, *options, f"--go_out={folder}/src", f"--go-grpc_out={folder}/src")
    environment = {
        "GOROOT": str(roots[-1]),
        "GOPATH": f"{folder}:{TOOLS / 'usr' / 'share' / 'gocode'}",
        "GO111MODULE": "off",
        "CGO_ENABLED": "0",
        # The first build takes most of a minute, and later ones a second.
        "GOCACHE": str(TOOLS / "go-cache"),
    }
    binary = folder / "client"
    built = await run(str(roots[-1] / "bin" / "go"), "build", "-o", str(binary), "client", **environment)
    assert built.status == 0, built.errors
    return (str(binary),)


async def cpp_example() -> Sequence[str]:
    """Return the command of the C++ example. Skips the test without CMake, a compiler and gRPC for C++."""
    for name in ("cmake", "c++", "pkg-config", "protoc", "grpc_cpp_plugin"):
        if program(name) is None:
            pytest.skip(f"{name} is not there: make tools-cpp")
    # The first build takes a minute, and later ones a second.
    build = TOOLS / "cpp"
    libraries = next((TOOLS / "usr" / "lib").glob("*-linux-gnu"), None)
    environment = {"PATH": f"{TOOLS / 'usr' / 'bin'}:{os.defpath}"}
    if libraries is not None and (libraries / "pkgconfig" / "grpc++.pc").exists():
        # The files of pkg-config name folders below /usr.
        environment |= {"PKG_CONFIG_SYSROOT_DIR": str(TOOLS), "PKG_CONFIG_PATH": str(libraries / "pkgconfig")}
        environment |= {"LIBRARY_PATH": str(libraries), "LD_LIBRARY_PATH": str(libraries)}
    configured = await run("cmake", "-S", str(CPP), "-B", str(build), **environment)
    if configured.status != 0 and "pkg_check_modules" in configured.errors:
        pytest.skip("gRPC for C++ is not there: make tools-cpp")
    assert configured.status == 0, configured.errors
    built = await run("cmake", "--build", str(build), "--parallel", "2", **environment)
    assert built.status == 0, built.output + built.errors
    return ("env", *(f"{name}={value}" for name, value in environment.items()), str(build / "client"))


async def java_example(folder: Path) -> Sequence[str]:
    """Return the command of the Java example, which is built in the folder. Skips the test without Java's gRPC."""
    java, javac, plugin = (program(name) for name in ("java", "javac", "grpc_java_plugin"))
    if java is None or javac is None or plugin is None or program("protoc") is None:
        pytest.skip("Java with gRPC is not there: make tools-java, and a JDK")
    jars = [next((jar for place in JARS if (jar := place / f"{name}.jar").exists()), Path(name)) for name in CLASSES]
    if lacking := [jar.name for jar in jars if not jar.exists()]:
        pytest.skip(f"gRPC for Java is not there: {lacking}: make tools-java")
    source, classes = folder / "generated", folder / "classes"
    source.mkdir()
    options = (f"--java_out={source}", f"--plugin=protoc-gen-grpc={plugin}", f"--grpc_out={source}")
    await generate(unpacked(), source, *options)
    path = ":".join(map(str, (classes, *jars)))
    files = [*map(str, source.rglob("*.java")), str(JAVA / "Client.java")]
    compiled = await run(javac, "-nowarn", "-cp", path, "-d", str(classes), *files)
    assert compiled.status == 0, compiled.errors
    return (java, "-cp", path, "Client")


async def generate(environment: Sequence[str], folder: Path, *options: str) -> None:
    """Generate code from proto/llm.proto with the protoc of `.tools`."""
    package = find_spec("grpc_tools")
    assert package is not None
    assert package.origin is not None
    # google/protobuf/*.proto, which are a package of their own in Debian.
    well_known = Path(package.origin).parent / "_proto"
    includes = [f"-I{ROOT / path}" for path in INCLUDES]
    protoc = program("protoc")
    assert protoc is not None, "protoc is not installed"
    ended = await run(*environment, protoc, *includes, f"-I{well_known}", *options, *PROTOS)
    assert ended.status == 0, ended.errors
