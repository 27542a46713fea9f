"""The command `durable-llm`. It needs the extra `cli`, which the library does without."""


def main() -> None:
    """Run the command line and exit."""
    # An interrupted import ends in a traceback, or prints the interrupt and goes on. So until a command waits, Ctrl-C
    # ends the process, from before the first import on: the module signal itself imports more.
    import _signal  # type: ignore[import-not-found]

    _signal.signal(_signal.SIGINT, _signal.SIG_DFL)
    import sys
    from importlib.util import find_spec

    try:
        missing = [name for name in ("click", "rich") if find_spec(name) is None]
    except ValueError:
        missing = ["click"]
    if missing:
        sys.stderr.write("durable-llm: the command line is an extra of its package: pip install 'durable-llm[cli]'\n")
        sys.exit(1)
    from durable_llm.cli._run import run

    sys.exit(run())
