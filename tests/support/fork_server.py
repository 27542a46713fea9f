"""Starts services by forking a process that has imported them, for a tenth of the processor time.

    python -m tests.support.fork_server SOCKET [MODULE ...]

The suite starts several hundred services, and the imports of one take over a second. This server imports all of them
once for a test process, and has one thread. For each request it forks, reports the process id, and later the exit
status. It ends with the test process. Trainers and GPU workers with the torch engine have a server of their own,
because torch takes six seconds more. All other programs are executed as always, and so are services on other systems
than Linux. The tests of what is installed, of `make up` and of `make demo` execute the services, too.
"""

import asyncio
import ctypes
import gc
import importlib
import json
import os
import runpy
import selectors
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from io import BufferedWriter
from pathlib import Path
from typing import Final

from deploy.local.exec_with_parent import PR_SET_PDEATHSIG
from deploy.local.process import Started, execute

SERVICES: Final = ("services.codec", "services.gateway", "services.gpu_worker", "services.http", "services.notifier")
_ROOT: Final = Path(__file__).parents[2]
TRAINER: Final = "services.trainer"
_WITH_TORCH: Final = ("services.gpu_worker.engines.torch", f"{TRAINER}.__main__")
_servers: dict[tuple[str, ...], tuple[socket.socket, subprocess.Popen[bytes]]] = {}
"""The servers, by what each has imported as well as the services."""


class _Forked:
    def __init__(self, pid: int, answers: asyncio.StreamReader) -> None:
        self.pid = pid
        self._answers = answers

    async def wait(self) -> int:
        return int(await self._answers.readline())


async def start(
    command: Sequence[str], environment: Mapping[str, str], working_dir: Path, log: BufferedWriter
) -> Started:
    """Start a program as execute() does, and a service by a fork."""
    if (
        sys.platform != "linux"
        or tuple(command[:2]) != (sys.executable, "-m")
        or command[2] not in (*SERVICES, TRAINER)
    ):
        return await execute(command, environment, working_dir, log)
    is_torch_engine = command[2] == "services.gpu_worker" and environment.get("GPU_WORKER_ENGINE") == "torch"
    modules = _WITH_TORCH if is_torch_engine or command[2] == TRAINER else ()
    if modules not in _servers:
        _servers[modules] = _start_server(modules)
    answers = asyncio.StreamReader()
    reading, writing = os.pipe()
    await asyncio.get_running_loop().connect_read_pipe(
        lambda: asyncio.StreamReaderProtocol(answers), os.fdopen(reading, "rb", 0)
    )
    request = os.memfd_create("request")
    os.write(request, json.dumps([command[2:], dict(environment), str(working_dir)]).encode())
    socket.send_fds(_servers[modules][0], [b"\0"], [request, log.fileno(), writing])
    os.close(request)
    os.close(writing)
    return _Forked(int(await answers.readline()), answers)


def _start_server(modules: Sequence[str]) -> tuple[socket.socket, subprocess.Popen[bytes]]:
    ours, its = socket.socketpair()
    with its:
        command = (sys.executable, "-m", __name__, str(its.fileno()), *modules)
        server = subprocess.Popen(
            command, cwd=_ROOT, pass_fds=[its.fileno()], stdin=subprocess.DEVNULL, process_group=0
        )
    return ours, server


def _serve(control: socket.socket) -> tuple[int, int]:
    """Fork for each request; return the descriptors of the request and of the log in the new process."""
    selector = selectors.DefaultSelector()
    selector.register(control, selectors.EVENT_READ)
    while True:
        for key, _ in selector.select():
            if key.fileobj is not control:
                pid, answers = key.data
                status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
                _answer(answers, status)
                selector.unregister(key.fd)
                os.close(key.fd)
                os.close(answers)
                continue
            message, descriptors, *_ = socket.recv_fds(control, 1, 3)
            if not message:
                os._exit(0)
            request, log, answers = descriptors
            if not (pid := os.fork()):
                for other in [*selector.get_map().values()]:
                    os.close(other.fd)
                    if other.data:
                        os.close(other.data[1])
                os.close(answers)
                return request, log
            os.setpgid(pid, pid)
            os.close(request)
            os.close(log)
            _answer(answers, pid)
            selector.register(os.pidfd_open(pid), selectors.EVENT_READ, (pid, answers))


def _answer(answers: int, number: int) -> None:
    # A test that was cut off reads no answer. The other services go on.
    with suppress(BrokenPipeError):
        os.write(answers, f"{number}\n".encode())


def _become(request: int, log: int) -> None:
    """Become the service of the request, with its environment, folder and log."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    os.dup2(log, sys.stdout.fileno())
    os.dup2(log, sys.stderr.fileno())
    os.close(log)
    os.lseek(request, 0, os.SEEK_SET)
    with os.fdopen(request, "rb") as file:
        (module, *arguments), environment, working_dir = json.load(file)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(working_dir)
    folders = [working_dir, *environment.get("PYTHONPATH", "").split(os.pathsep)]
    sys.path[:] = [*folders, *(folder for folder in sys.path[1:] if folder not in folders)]
    sys.argv[1:] = arguments
    # It is executed again, and runpy warns of a module that is there already.
    del sys.modules[f"{module}.__main__"]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


def main() -> None:
    """Serve, and in each new process run the service."""
    for module in (*(f"{service}.__main__" for service in SERVICES), *sys.argv[2:]):
        importlib.import_module(module)
    # A collection would write to all pages that the processes share.
    gc.collect()
    gc.freeze()
    _become(*_serve(socket.socket(fileno=int(sys.argv[1]))))


if __name__ == "__main__":
    main()
