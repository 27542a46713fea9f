"""Becomes another program, and dies with the process that started it.

    python -I -S exec_with_parent.py PARENT_PID PROGRAM ARGUMENT...

A supervisor that is killed with SIGKILL cannot stop its children; on Linux the kernel then does. The request has to be
made in the child. A program of its own does it, and not `preexec_fn`, because Python code between fork and exec can
deadlock in a process with threads, as every process with a Temporal client has. Other systems know no such request:
there a killed supervisor leaves its children behind.
"""

import ctypes
import os
import signal
import sys

# From <sys/prctl.h>.
PR_SET_PDEATHSIG = 1


def main() -> None:
    """Ask for SIGKILL at the parent's death, then become the program."""
    parent, program, *arguments = sys.argv[1:]
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        # The parent may have died before the request was made.
        if os.getppid() != int(parent):
            sys.exit("the supervisor is gone")
    os.execvp(program, [program, *arguments])


main()
