"""The command `durable-llm`. It needs the extra `cli`, which the library does without."""

import signal
import sys
from importlib.util import find_spec


def main() -> None:
    """Run the command line and exit."""
    # An interrupted import may print the interrupt and go on. Until a command waits, Ctrl-C ends the process.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        missing = [name for name in ("click", "rich") if find_spec(name) is None]
    except ValueError:
        missing = ["click"]
    if missing:
        sys.stderr.write("durable-llm: the command line is an extra of its package: pip install 'durable-llm[cli]'\n")
        sys.exit(1)
    from durable_llm.cli._run import run

    sys.exit(run())
