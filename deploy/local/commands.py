"""The commands `up`, `demo` and `demo-pipelines`: start a stack, work with it, and stop it on a signal."""

import asyncio
import signal
from typing import Any, Final

from deploy.local.client import first_model, gateway_client
from deploy.local.demo import demo
from deploy.local.demo_pipelines import demo_pipelines
from deploy.local.demo_training import ENVIRONMENT, KINDS, demo_training
from deploy.local.hints import hints
from deploy.local.ports import require_free
from deploy.local.settings import StackSettings
from deploy.local.stack import Stack, ignored_variables
from deploy.local.supervisor import supervise
from durable_llm.errors import CredentialMissing


async def up(stack: Stack) -> None:
    """Print the addresses and example calls, then wait until cancelled."""
    async with gateway_client(stack) as client:
        try:
            print(hints(stack, await first_model(client)))
        except CredentialMissing:
            print(hints(stack, "<model>", credential=True))
    print("Ctrl-C stops everything.", flush=True)
    await asyncio.Event().wait()


COMMANDS: Final = {"up": up, "demo": demo, "demo-pipelines": demo_pipelines, "demo-training": demo_training}
_STACKS: Final[dict[str, dict[str, Any]]] = {"demo-training": {"only": KINDS, "environment": ENVIRONMENT}}
"""Arguments of Stack, where a command needs another one than all services."""


async def run(command: str, settings: StackSettings) -> int:
    """Start the stack, run a command on it, stop the stack. Return the exit status. Raises StackError.

    The first SIGINT, SIGTERM or SIGHUP stops everything in order. A second one kills what has not stopped yet.
    """
    stack = Stack(settings, report=_report, **_STACKS.get(command, {}))
    task = asyncio.current_task()
    assert task is not None

    def stop() -> None:
        if task.cancelling():
            stack.hurry()
        else:
            task.cancel()

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        asyncio.get_running_loop().add_signal_handler(number, stop)
    if ignored := ignored_variables():
        _report("stack", f"starts its own Temporal, and passes none of these on: {', '.join(ignored)}")
    if command == "demo":
        require_free(stack.ports.demo_webhook, "demo_webhook")
    try:
        async with stack:
            await supervise(stack, COMMANDS[command](stack), _report)
    except asyncio.CancelledError:
        # `up` always ends this way. A demo that was stopped is incomplete, so it fails.
        return 0 if command == "up" else 130
    return 0


def _report(name: str, words: str) -> None:
    print(f"  {name:<12} {words}", flush=True)
