"""The command line of `python -m deploy.local`: checks before the start, and prints failures."""

import argparse
import asyncio
import os
import signal
import sys
from collections.abc import Iterable

from pydantic import ValidationError

from deploy.local.commands import COMMANDS, run
from deploy.local.errors import StackError, UnknownSetting
from deploy.local.settings import StackSettings
from deploy.settings_table import CLASSES
from runtime.environment import unknown_variables


def main() -> int:
    """Run a command. Return 1, with the reason on stderr, when the stack could not start or continue."""
    parser = argparse.ArgumentParser(prog="python -m deploy.local", description="Run the suite on this machine.")
    parser.add_argument("command", choices=COMMANDS)
    command = parser.parse_args().command
    try:
        _require_known(os.environ)
        return asyncio.run(run(command, StackSettings()))
    except ValidationError as error:
        for problem in error.errors():
            print(f"STACK_{str(problem['loc'][0]).upper()}: {problem['msg']}", file=sys.stderr)
    except StackError as error:
        print(f"\n{error}", file=sys.stderr)
    finally:
        # The event loop has restored Python's handler, which prints a traceback.
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    return 1


def _require_known(names: Iterable[str]) -> None:
    """Raise UnknownSetting for misspelt variables. Print those that may be another program's."""
    unknown = unknown_variables(names, CLASSES)
    if misspelt := [variable for variable in unknown if variable.meant]:
        raise UnknownSetting(misspelt)
    for variable in unknown:
        print(f"  {variable}", file=sys.stderr)
