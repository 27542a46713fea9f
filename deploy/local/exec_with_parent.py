"""Replaces itself with another program, which the kernel kills when the process that started it dies.

    python -I -S exec_with_parent.py PARENT_PID PROGRAM ARGUMENT...

A supervisor that is killed with SIGKILL cannot stop its children. On Linux the kernel can, and the child has to request
it. This program makes the request instead of `preexec_fn`, because Python code between fork and exec can deadlock in a
process with threads, and every process with a Temporal client has threads. Other systems have no such request, so there
a killed supervisor leaves its children running.
"""

import ctypes
import os
import signal
import sys

# From <sys/prctl.h>.
PR_SET_PDEATHSIG = 1


def main() -> None:
    """Request SIGKILL at the parent's death, then execute the program."""
    parent, program, *arguments = sys.argv[1:]
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        # The parent may have died before the request was made.
        if os.getppid() != int(parent):
            sys.exit("the supervisor is gone")
    os.execvp(program, [program, *arguments])


if __name__ == "__main__":
    main()
