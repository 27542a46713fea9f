"""Submits a job, watches it, cancels it. The arguments of python -m clients.python.examples.client:

submit '{"user_id": "u", "request_id": "r", "model": "docstrings", "prompt": "def f("}'
watch llmjob-u-r [--from RESUME_TOKEN]
cancel llmjob-u-r [--reason WHY]

The gateway is at LLM_ADDRESS, by default 127.0.0.1:50051. Results go to stdout, the job's states to stderr.
"""

import signal

if __name__ == "__main__":
    # An interrupted import may print the interrupt and go on. Until there is a client, Ctrl-C ends the process.
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import argparse
import logging
import os
import sys

from google.protobuf import json_format

from durable_llm import FINAL_STATES, ApiError, Client, Job, JobError, JobRequest
from durable_llm.errors import Unavailable
from llm_pb.llm_pb2 import JobState

ADDRESS = os.environ.get("LLM_ADDRESS", "127.0.0.1:50051")


def watch(job: Job, resume_token: str) -> None:
    """Print the job's output, and each new state. Raises JobError for a job that did not succeed."""
    state = JobState.JOB_STATE_UNSPECIFIED
    text = ""

    def note(line: str) -> None:
        # On a terminal it does not continue a line of the output.
        nonlocal text
        print("\n" * (text[-1:] not in ("", "\n")) + line, file=sys.stderr)
        text = ""

    for message in job.watch(resume_token):
        if message.delta.rewind:
            note(f"the job started over: what follows replaces the output from byte {message.delta.offset}")
        print(message.delta.text, end="", flush=True)
        text = message.delta.text or text
        if message.HasField("status") and message.status.state != state:
            state = message.status.state
            note(JobState.Name(state))
    job.result()


def run(client: Client, arguments: argparse.Namespace) -> None:
    """Do what the command line asks for."""
    match arguments.command:
        case "submit":
            print(client.submit(json_format.Parse(arguments.job, JobRequest())).workflow_id)
        case "watch":
            watch(client.job(arguments.workflow_id), arguments.resume_token)
        case "cancel":
            state = client.job(arguments.workflow_id).cancel(arguments.reason).state
            print(JobState.Name(state) if state in FINAL_STATES else "cancel requested")


def parse() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(prog="client")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("submit").add_argument("job", help="a JobRequest as JSON")
    watching = commands.add_parser("watch")
    watching.add_argument("workflow_id")
    watching.add_argument("--from", dest="resume_token", default="")
    cancelling = commands.add_parser("cancel")
    cancelling.add_argument("workflow_id")
    cancelling.add_argument("--reason", default="")
    return parser.parse_args()


def main() -> int:
    """Run the command line; return the exit status."""
    arguments = parse()
    # The client says here where it goes on after a broken connection.
    logging.basicConfig(format="%(message)s")
    logging.getLogger("durable_llm").setLevel(logging.INFO)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with Client(ADDRESS) as client:
            run(client, arguments)
    except KeyboardInterrupt:
        return 130
    except (json_format.ParseError, JobError) as error:
        print(error, file=sys.stderr)
        return 1
    except ApiError as error:
        print(f"{error.code.name}: {error}", file=sys.stderr)
        if isinstance(error, Unavailable) and not error.reason:
            print(f"Does a gateway listen at {ADDRESS}? LLM_ADDRESS names another address.", file=sys.stderr)
        return 1
    finally:
        # Nothing is left to interrupt.
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    return 0


if __name__ == "__main__":
    sys.exit(main())
