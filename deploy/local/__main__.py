"""`python -m deploy.local up` runs the suite until Ctrl-C; `… demo` shows one job, `… demo-pipelines` a pipeline."""

import signal
import sys

# The imports take a second in which nothing runs yet, so Ctrl-C ends the process without a traceback.
signal.signal(signal.SIGINT, signal.SIG_DFL)

from deploy.local.command_line import main  # noqa: E402

sys.exit(main())
