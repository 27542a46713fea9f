"""The life of a service process: set up logging and tracing, run until a signal, unwind, send the last spans, exit."""

import asyncio
import logging
import os
import signal
import sys
from collections.abc import Awaitable, Callable, Collection
from typing import NoReturn

import uvloop
from pydantic import ValidationError
from pydantic_settings import BaseSettings
from pydantic_settings.exceptions import SettingsError

from encryption import EncryptionSettings, NoKeyStore
from runtime import log, telemetry
from runtime.environment import (
    WrongSetting,
    read_variable_files,
    rename_variables,
    setting_problems,
    unknown_variables,
)

_log = logging.getLogger(__name__)


def run(
    service: str,
    main: Callable[[], Awaitable[None]],
    settings: Collection[type[BaseSettings]] = (),
    new_provider: telemetry.NewProvider = telemetry.new_provider,
) -> NoReturn:
    """Run `main()` and exit the process; `service` is its name in traces.

    `settings` are the classes that main reads. Logs a warning for each environment variable that looks like one of them
    and is none. That is no error: an older build may be given the settings of a newer one.

    A setting may come from a file: see read_variable_files.

    A process that connects to Temporal passes runtime.temporal.new_provider.

    Logs an error for each wrong setting, with the name of its variable and without its value.

    The first SIGTERM, SIGINT or SIGHUP cancels main: its `async with` blocks end in reverse order, each with its own
    grace. A SIGHUP that nohup has the process ignore stays ignored. The exit status is 0 after that or when main
    returns. It is 1, with a traceback in the log, when main raises.
    """
    status, settings = 0, [log.LogSettings, *settings]
    try:
        log.configure(log.LogSettings())
        for warning in rename_variables(os.environ, settings):
            _log.warning("%s", warning)
        for unknown in unknown_variables(os.environ, settings):
            _log.warning("%s", unknown)
        read_variable_files(os.environ, settings)
        # A message of an error may quote content, which must not leave the process in clear.
        encrypts = EncryptionSettings in settings and EncryptionSettings().key_store is not None
        if encrypts:
            log.redact_errors()
        with (
            telemetry.tracing(service, new_provider, redact_errors=encrypts),
            asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner,
        ):
            runner.run(_run(main))
    except (ValidationError, SettingsError) as error:
        for problem in setting_problems(error, settings):
            _log.error("%s", problem)
        status = 1
    except (WrongSetting, NoKeyStore) as error:
        _log.error("%s", error)
        status = 1
    except Exception as error:  # noqa: BLE001  # the process ends here: any error belongs in the log and the exit status
        # The message is for the operator, so it has a field of its own, which is not redacted.
        _log.exception("ended by an error", extra={"error": str(error)})
        status = 1
    # Threads of gRPC and Temporal sometimes outlive the interpreter, and abort the process when they use what it has
    # torn down. Everything of the suite has ended by now, so the process exits without tearing the interpreter down.
    logging.shutdown()
    sys.stdout.flush()
    os._exit(status)


async def _run(main: Callable[[], Awaitable[None]]) -> None:
    task = asyncio.ensure_future(main())
    stopped = False

    def stop() -> None:
        nonlocal stopped
        if not stopped:
            stopped = True
            task.cancel()

    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
            loop.add_signal_handler(number, stop)
    try:
        await task
    except asyncio.CancelledError:
        if not stopped:
            raise


async def forever() -> None:
    """Wait until cancelled."""
    await asyncio.Event().wait()
