"""The errors that keep the stack from running, in one tree.

    StackError
    ├── UnknownSetting   a variable looks like a setting and is none
    ├── EngineMissing    what the engine of the GPU workers needs is not installed
    ├── ProgramMissing   a program is neither in the environment nor on PATH
    ├── PortTaken        something else listens on a port
    ├── StateBusy        another supervisor works in the state folder
    ├── StateShared      the state folder is not a stack's, and other users can read it
    ├── ProcessFailed    a process ended, or was not ready in time
    └── DemoFailed       a step of the demo failed

Every message is for a person at a terminal and says what to do next.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from runtime.environment import Unknown


class StackError(Exception):
    """The stack cannot start or cannot continue."""


class UnknownSetting(StackError):
    """Variables look like settings and are none, so they would have no effect."""

    def __init__(self, unknown: Sequence[Unknown]) -> None:
        super().__init__("\n".join(map(str, unknown)))


class EngineMissing(StackError):
    """The package of the engine that the GPU workers are to run is not installed."""

    def __init__(self, engine: str) -> None:
        super().__init__(
            f"STACK_ENGINE is {engine}, which is not installed in {sys.prefix}. docs/operate.md says how to install"
            " vLLM. `make env` installs torch and simulated."
        )


class ProgramMissing(StackError):
    """A program that the stack runs is not installed."""

    def __init__(self, program: str) -> None:
        super().__init__(f"{program} is not installed: `make env` installs it.")


class PortTaken(StackError):
    """Something else listens on a port that the stack needs."""

    def __init__(self, port: int, setting: str) -> None:
        super().__init__(
            f"Port {port} is taken, maybe by another `make up`. Stop what listens there, or set {setting} to another"
            " port (0 takes any free one)."
        )


class StateBusy(StackError):
    """Another supervisor uses the state folder. Two servers on one database would corrupt it."""

    def __init__(self, state_dir: Path) -> None:
        super().__init__(
            f"Another stack runs in {state_dir}. Stop it, or set STACK_STATE_DIR to another folder and the ports"
            " (STACK_*_PORT) to others."
        )


class StateShared(StackError):
    """The folder is not a stack's. Making it private would lock other users out; leaving it would show them prompts."""

    def __init__(self, state_dir: Path) -> None:
        super().__init__(
            f"STACK_STATE_DIR is {state_dir}, which is no state folder of a stack, and other users can read it. Set it"
            " to a folder that does not exist yet, or to one of mode 0700."
        )


class ProcessFailed(StackError):
    """A process ended unexpectedly, or was not ready in time. The message ends with its log."""

    def __init__(self, name: str, reason: str, log_path: Path, last_lines: list[str]) -> None:
        self.name = name
        shown = "".join(f"\n  | {line}" for line in last_lines) or "\n  (it wrote nothing)"
        super().__init__(f"The end of the log of {name}:{shown}\n{name} {reason}. Its log: {log_path}")


class DemoFailed(StackError):
    """A step of the demo failed."""
