"""`python -m deploy.local up` runs the suite until Ctrl-C; `demo` shows one job and stops."""

import argparse
import asyncio
import sys

from pydantic import ValidationError

from deploy.local.commands import COMMANDS, run
from deploy.local.errors import StackError
from deploy.local.settings import StackSettings


def main() -> int:
    """Run a command; returns 1, with the reason on stderr, when the stack could not start or go on."""
    parser = argparse.ArgumentParser(prog="python -m deploy.local", description=__doc__)
    parser.add_argument("command", choices=COMMANDS)
    command = parser.parse_args().command
    try:
        return asyncio.run(run(command, StackSettings()))
    except ValidationError as error:
        for problem in error.errors():
            print(f"STACK_{str(problem['loc'][0]).upper()}: {problem['msg']}", file=sys.stderr)
    except StackError as error:
        print(f"\n{error}", file=sys.stderr)
    return 1


sys.exit(main())
