"""Runs commands of durable-llm one after another in this process, and prints what became of each, as JSON.

Its standard input is a list of lists of arguments, in which surrogates stand for bytes that are no UTF-8.
"""

import io
import json
import sys
import traceback

from durable_llm.cli._run import run


def main() -> None:
    """Run the commands."""
    ended = []
    for arguments in json.load(sys.stdin):
        sys.argv = ["durable-llm", *arguments]
        sys.stderr = io.TextIOWrapper(io.BytesIO(), encoding="utf-8", write_through=True)
        try:
            status: int | None = run()
        except BaseException:  # noqa: BLE001  # whatever it is, it would be a traceback
            status = None
            traceback.print_exc()
        ended.append((status, sys.stderr.buffer.getvalue().decode()))  # type: ignore[attr-defined]
    sys.__stderr__.write(json.dumps(ended))  # type: ignore[union-attr]


if __name__ == "__main__":
    main()
