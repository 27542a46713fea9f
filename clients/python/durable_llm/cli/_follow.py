"""Follows a job to its end, whatever breaks meanwhile."""

from contextlib import closing
from typing import TYPE_CHECKING

from durable_llm.cli._exits import Interrupted, ReaderGone
from durable_llm.cli._interrupts import held, interruptible
from durable_llm.cli._progress import Progress
from durable_llm.cli._stdout import JobText, write_json
from durable_llm.cli._text import say

if TYPE_CHECKING:
    from durable_llm import Job, JobResult


def follow(job: "Job", *, accepted: bool, resume_token: str = "", as_json: bool = False, quiet: bool = False) -> None:
    """Print the output of a job as it is generated, or with `as_json` each message of its stream.

    `accepted` says whether the service is known to have the job. Raises JobError for a job that did not succeed,
    ApiError, and Interrupted.
    """
    token = resume_token
    text = JobText()
    # Before Ctrl-C may come at any place: this imports modules.
    progress = Progress(quiet=quiet or as_json)
    try:
        with interruptible(), progress, closing(job.watch(token)) as messages:
            for message in messages:
                progress.answered()
                # Between the text and its token there is no Ctrl-C: the token that is shown continues after the text.
                with held():
                    if as_json:
                        write_json(message)
                    elif message.HasField("delta"):
                        progress.give_way()
                        text.add(message.delta)
                    token = message.resume_token or token
                if message.HasField("status"):
                    progress.show(message.status)
            job.result()
    except KeyboardInterrupt:
        text.close()
        raise Interrupted(_come_back(job, token)) from None
    except Exception as error:
        text.close()
        if _continues(error, exists=accepted or token != resume_token):
            say(_come_back(job, token))
        raise
    text.close()


def wait(job: "Job", *, quiet: bool = False) -> "JobResult":
    """Return the result of a job once it has ended. Raises JobError, ApiError and Interrupted."""
    progress = Progress(quiet=quiet)
    try:
        with interruptible(), progress, closing(job.watch()) as messages:
            for message in messages:
                progress.answered()
                if message.HasField("status"):
                    progress.show(message.status)
            return job.result()
    except KeyboardInterrupt:
        raise Interrupted(f"The job continues. Come back: durable-llm output {job.workflow_id}") from None


def _come_back(job: "Job", token: str) -> str:
    rest = f" --resume-token {token}" if token else ""
    return (
        f"The job continues. The rest of its text: durable-llm watch {job.workflow_id}{rest}\n"
        f"All of it: durable-llm output {job.workflow_id}"
    )


def _continues(error: Exception, *, exists: bool) -> bool:
    """Return whether there is a job to come back to, and somebody to tell. With a wrong address nobody knows."""
    from durable_llm.errors import JobError, JobNotFound

    return exists and not isinstance(error, JobError | JobNotFound | ReaderGone | OSError)
