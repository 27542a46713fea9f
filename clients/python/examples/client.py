"""A client of LlmService: submits a job, watches it across broken connections, cancels it.

python -m clients.python.examples.client submit '{"user_id": "u", "request_id": "r", "model": "docstrings", "prompt": "x"}'
python -m clients.python.examples.client watch llmjob-u-r [--offset N]
python -m clients.python.examples.client cancel llmjob-u-r [--reason WHY]

The gateway is at LLM_ADDRESS, by default 127.0.0.1:50051. Results go to stdout, the job's states to stderr.
"""

import signal

if __name__ == "__main__":
    # An interrupted import may print the interrupt and go on. Until there is an event loop, Ctrl-C ends the process.
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import argparse
import asyncio
import os
import sys
from collections.abc import AsyncIterator

import grpc
from google.protobuf import json_format

from llm_pb import llm_pb2
from llm_pb.llm_pb2_grpc import LlmServiceStub

ADDRESS = os.environ.get("LLM_ADDRESS", "127.0.0.1:50051")
RETRY_SECONDS = 1
TRIES, FIRST_TRIES = 60, 5
"""How often in a row a watch may fail: less often as long as no gateway has answered, for the address may be wrong."""
PASSING = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.RESOURCE_EXHAUSTED, grpc.StatusCode.CANCELLED)
"""All pass by themselves: a gateway that restarts or is cut off, that serves its limit of streams, that just stops."""


async def watch(stub: LlmServiceStub, workflow_id: str, offset: int = 0) -> AsyncIterator[llm_pb2.StreamStatusResponse]:
    """Yield a job's messages to its end.

    A stream that breaks is opened again where it broke, so that every byte of the output comes once. Raises AioRpcError
    for an error that does not pass by itself, or not in time.
    """
    token = ""
    failures, tries = 0, FIRST_TRIES
    while True:
        request = llm_pb2.StreamStatusRequest(workflow_id=workflow_id, output_offset=offset, resume_token=token)
        try:
            async for message in stub.StreamStatus(request):
                offset, token = message.next_offset, message.resume_token
                failures, tries = 0, TRIES
                yield message
            return
        except grpc.aio.AioRpcError as error:
            failures += 1
            if error.code() == grpc.StatusCode.RESOURCE_EXHAUSTED:
                tries = TRIES
            if error.code() not in PASSING or failures == tries:
                raise
            print(f"{error.details()}; going on at byte {offset}", file=sys.stderr)
            await asyncio.sleep(RETRY_SECONDS)


def show(message: llm_pb2.StreamStatusResponse) -> None:
    """Print what a message brings."""
    if message.delta.rewind:
        where = message.delta.offset
        print(f"the job started over: what follows replaces the output from byte {where}", file=sys.stderr)
    print(message.delta.text, end="", flush=True)
    if message.HasField("status"):
        status = message.status
        print(llm_pb2.JobState.Name(status.state), f"{status.progress.percent:.0f} %", file=sys.stderr)


async def run(arguments: argparse.Namespace) -> int:
    """Do what the command line asks for; return the exit status. Ctrl-C cancels it."""
    task = asyncio.current_task()
    assert task is not None
    # It wakes the loop. The handler of asyncio.run does not: a signal that another thread takes, or that comes just
    # before the loop sleeps, would wait for the next event.
    asyncio.get_running_loop().add_signal_handler(signal.SIGINT, task.cancel)
    options = [("grpc.keepalive_time_ms", 30_000)]
    async with grpc.aio.insecure_channel(ADDRESS, options) as channel:
        stub = LlmServiceStub(channel)
        match arguments.command:
            case "submit":
                job = json_format.Parse(arguments.job, llm_pb2.JobRequest())
                print((await stub.Submit(llm_pb2.SubmitRequest(job=job))).workflow_id)
            case "cancel":
                request = llm_pb2.CancelRequest(workflow_id=arguments.workflow_id, reason=arguments.reason)
                status = (await stub.Cancel(request)).status
                print("cancel requested" if status.cancel_requested else llm_pb2.JobState.Name(status.state))
            case "watch":
                status = llm_pb2.JobStatus()
                async for message in watch(stub, arguments.workflow_id, arguments.offset):
                    show(message)
                    status = message.status
                if status.HasField("error"):
                    print(status.error.message, file=sys.stderr)
                return 0 if status.state == llm_pb2.JOB_STATE_SUCCEEDED else 1
    return 0


def main() -> int:
    """Parse the command line and run it."""
    parser = argparse.ArgumentParser(prog="client")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("submit").add_argument("job", help="a JobRequest as JSON")
    watching = commands.add_parser("watch")
    watching.add_argument("workflow_id")
    watching.add_argument("--offset", type=int, default=0)
    cancelling = commands.add_parser("cancel")
    cancelling.add_argument("workflow_id")
    cancelling.add_argument("--reason", default="")
    try:
        return asyncio.run(run(parser.parse_args()))
    except json_format.ParseError as error:
        print(error, file=sys.stderr)
    except grpc.aio.AioRpcError as error:
        print(f"{error.code().name}: {error.details()}", file=sys.stderr)
        if error.code() == grpc.StatusCode.UNAVAILABLE:
            print(f"Does a gateway listen at {ADDRESS}? LLM_ADDRESS names another address.", file=sys.stderr)
    except asyncio.CancelledError:
        return 130
    finally:
        # The loop has given it back, and nothing is left to interrupt.
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    return 1


if __name__ == "__main__":
    sys.exit(main())
