"""What a request of OpenAI's API asks for: a job, and what the job itself does not say.

What must be known later, by any replica, is a label of the job.
"""

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Self

from jobs.classes import is_background
from jobs.field_rules import Violation
from jobs.ids import ID_PATTERN
from jobs.parsing import InvalidFields, parse
from llm_pb import common_pb2, llm_pb2
from openai_api.errors import InvalidBody, invalid
from openai_api.parameters import Parameters, text_of

NOTE_LABEL: Final = "openai.request"
"""The label that holds a Note."""
MAX_METADATA: Final = 15
"""Maximum number of pairs of metadata. A job has 16 labels, and one is the note."""
DEFAULT_USER: Final = "openai"
"""The user of a request that names none, where the caller's credential is for all users."""


@dataclass(frozen=True)
class Note:
    """What the job does not say of the request that made it."""

    background: bool = False
    instructions: bool = False
    """Whether the first message is the request's `instructions`."""
    format_name: str = ""
    """The name that the request gives its JSON Schema."""
    unstored: bool = False
    """Whether the job is deleted once its answer has been read: another request than one whose job is kept."""
    nonce: str = ""
    """Distinguishes equal jobs of two requests: see services.http.openai.repeats."""

    @classmethod
    def of(cls, labels: Mapping[str, str]) -> Self:
        """Return the note of a job with these labels; an empty one for a job that came another way."""
        try:
            note = json.loads(labels.get(NOTE_LABEL, "{}"))
            return cls(**note)
        except (TypeError, ValueError):
            return cls()

    def __str__(self) -> str:
        """Return what the label holds: the members that are set."""
        return json.dumps({name: value for name, value in vars(self).items() if value}, separators=(",", ":"))


_MESSAGE: Final = re.compile(r"messages\[(\d+)\]")
_FIELD: Final = re.compile(r"[a-z_]+")
_SHARED_NAMES: Final = {"labels": "metadata", "job_class": "service_tier"}
"""The parameters that fields are made from, where the names differ and all requests share them."""


@dataclass
class Asked:
    """A request."""

    job: llm_pb2.JobRequest
    """The job, without a request_id and without the label of the note."""
    names: Mapping[str, str]
    """The parameters that fields of the job were made from, where the names differ: those that the caller has sent."""
    message_paths: Sequence[str] = ()
    """The parameter that each message was made from. One without an index is the text of the message."""
    stream: bool = False
    include_usage: bool = False
    """Whether the last chunk of a stream holds the usage."""
    background: bool = False
    instructions: bool = False
    format_name: str = ""
    store: bool = True
    """False: the job is deleted once its answer has been read."""

    def note(self, nonce: str) -> Note:
        """Return what is to be known of the request later."""
        return Note(self.background, self.instructions, self.format_name, not self.store, nonce)

    def violation(self, of_job: tuple[str, str]) -> Violation:
        """Return a violation of the rules of jobs, field and description, as one of the request."""
        path, description = of_job
        path = path.removeprefix("job.").removeprefix("params.")
        if (found := _MESSAGE.match(path)) is not None and int(found[1]) < len(self.message_paths):
            made_from = self.message_paths[int(found[1])]
            return Violation(made_from + (path[found.end() :] if "[" in made_from else ""), description)
        field = _FIELD.match(path)
        name = field[0] if field else path
        rest = path[len(name) :]
        if name in ("job", ""):
            # All of it is too large.
            name, description = "messages" if self.job.messages else "prompt", description.removeprefix("the request ")
        elif name == "choice":
            rest = rest.removeprefix(".options")
        elif name == "min_tokens":
            description = description.replace("max_tokens", self.names.get("max_tokens", "max_tokens"))
        return Violation({**_SHARED_NAMES, **self.names}.get(name, name) + rest, description)


def take_common(parameters: Parameters, job: llm_pb2.JobRequest) -> None:
    """Fill in what all endpoints call by the same names: model, user, metadata, service tier. Raises InvalidBody."""
    job.model = parameters.text("model") or ""
    if not job.model:
        raise invalid("model", "is required: a model that /v1/models lists")
    user = ""
    for name in ("user", "safety_identifier"):
        given = parameters.text(name)
        if given and not user:
            user, parameters.names["user_id"] = given, name
    job.user_id = (
        user if not user or ID_PATTERN.fullmatch(user) else f"sha256-{hashlib.sha256(user.encode()).hexdigest()}"
    )
    # They say which cached prompts to use, and change no answer. A user's jobs share their cached prompts here.
    parameters.text("prompt_cache_key")
    parameters.allow("prompt_cache_retention", "in_memory", "24h")
    _take_metadata(parameters, job)
    _take_notify(parameters, job)
    match tier := parameters.text("service_tier"):
        case None | "auto" | "default":
            pass
        case _ if tier in CLASS_OF_TIER:
            job.job_class = CLASS_OF_TIER[tier]
        case _:
            raise invalid("service_tier", "must be auto, default, flex or priority")


CLASS_OF_TIER: Final = {"priority": common_pb2.JOB_CLASS_HIGH, "flex": common_pb2.JOB_CLASS_BACKGROUND}
"""The class of a job by its service tier, where it is not the default."""


def tier_of(job: llm_pb2.JobRequest) -> str:
    """Return the service tier of a job. No tier stands for JOB_CLASS_SCHEDULED, which is served like "flex"."""
    if is_background(job.job_class):
        return "flex"
    return "priority" if job.job_class == common_pb2.JOB_CLASS_HIGH else "default"


def _take_notify(parameters: Parameters, job: llm_pb2.JobRequest) -> None:
    """Take the targets of the outcome, which OpenAI's API has for a whole project only."""
    if (ours := parameters.members("durable_llm")) is None:
        return
    targets = ours.any("notify")
    ours.require_all_taken()
    parameters.names["notify"] = ours.path("notify")
    try:
        parse({"notify": targets}, job)
    except InvalidFields as error:
        wrong = [Violation(ours.path(field), description) for field, description in error.violations]
        wrong = wrong or [Violation(ours.path("notify"), str(error))]
        message = "; ".join(f"{field} {description}" for field, description in wrong)
        raise InvalidBody(message, "INVALID_REQUEST", wrong) from error


def _take_metadata(parameters: Parameters, job: llm_pb2.JobRequest) -> None:
    metadata = parameters.any("metadata")
    if metadata is None:
        return
    if not isinstance(metadata, dict):
        raise invalid("metadata", "must be an object")
    if len(metadata) > MAX_METADATA:
        raise invalid("metadata", f"must have at most {MAX_METADATA} pairs")
    for key, value in metadata.items():
        path = f"metadata.{key}"
        if key == NOTE_LABEL:
            raise invalid(path, "is reserved")
        job.labels[text_of(key, "metadata")] = text_of(value, path)
