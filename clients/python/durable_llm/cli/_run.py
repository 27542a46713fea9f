"""The command line as a whole: its commands, and what its errors become."""

import sys
from importlib.metadata import PackageNotFoundError, version

import click

from durable_llm.cli import _batch, _chat, _config, _files, _manage, _pipelines, _run_jobs, _schedules, _service
from durable_llm.cli._exits import CommandError, Exit, Interrupted, ReaderGone
from durable_llm.cli._options import take_text
from durable_llm.cli._stdout import StandardOutput, hold_descriptors, write_line
from durable_llm.cli._text import say, visible

_COMMANDS = (
    _run_jobs.submit,
    _run_jobs.watch,
    _run_jobs.output,
    _manage.ls,
    _manage.get,
    _manage.cancel,
    _manage.delete,
    _manage.delete_user,
    _manage.deliveries,
    _manage.redeliver,
    _schedules.schedules,
    _service.models,
    _service.workers,
    _service.quota,
    _files.files,
    _batch.batch,
    _pipelines.pipeline,
    _chat.chat,
    _config.config,
    _config.completion,
)


class _InOrder(click.Group):
    """A group that lists its commands in the order in which they were added."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)


def _show_version(context: click.Context, parameter: click.Parameter, shown: bool) -> None:
    if shown:
        try:
            write_line(version("durable-llm"))
        except PackageNotFoundError:
            write_line("not installed")
        context.exit()


@click.group(cls=_InOrder, context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--version", is_flag=True, is_eager=True, expose_value=False, callback=_show_version, help="Print it.")
def durable_llm() -> None:
    """Durable LLM jobs: submit one, watch its text across everything that breaks, come back to it later.

    Text goes to standard output, everything else to standard error. Exit status: 0 success, 1 the job failed, 2 usage,
    3 not found, 4 no access, 5 cancelled, 6 timed out, 7 unavailable, 8 a limit is reached, 9 rewound in a pipe,
    130 Ctrl-C.
    """


for _command in _COMMANDS:
    durable_llm.add_command(_command)
take_text(durable_llm)


def place_of(error: click.ClickException) -> str:
    """Return where an option belongs, for one that is before the command that takes it."""
    early = (
        isinstance(error, click.NoSuchOption) and error.ctx is not None and isinstance(error.ctx.command, click.Group)
    )
    return " Options follow the command: durable-llm ls --address 127.0.0.1:50051" if early else ""


def run() -> int:
    """Run the command line and return its exit status."""
    hold_descriptors()
    sys.stdout = StandardOutput()
    # A message that the encoding of standard error lacks is escaped, not lost.
    sys.stderr.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    try:
        durable_llm.main(prog_name="durable-llm", standalone_mode=False)
    except click.exceptions.Exit as ended:
        return ended.exit_code
    except click.Abort:
        say("")
        return Exit.INTERRUPTED
    except click.ClickException as error:
        say(f"durable-llm: {visible(error.format_message())}{place_of(error)}")
        return Exit.USAGE
    except CommandError as error:
        say(f"durable-llm: {visible(str(error))}")
        return error.status
    except Interrupted as interrupted:
        say(f"\n{interrupted}")
        return Exit.INTERRUPTED
    except ReaderGone:
        return Exit.BROKEN_PIPE
    except OSError as error:
        # Without Python's number of the error.
        named = f"{error.filename}: {error.strerror}" if error.filename else str(error)
        say(f"durable-llm: {visible(named)}")
        return Exit.FAILED
    return Exit.OK
