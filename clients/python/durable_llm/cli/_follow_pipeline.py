"""Follows a pipeline to its end, and describes it and its steps."""

import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from durable_llm._enums import name_of
from durable_llm.cli._exits import CommandError, Exit, Interrupted
from durable_llm.cli._interrupts import held, interruptible
from durable_llm.cli._stdout import on_terminal, write, write_json
from durable_llm.cli._text import say, visible

if TYPE_CHECKING:
    from google.protobuf.any_pb2 import Any as AnyMessage

    from durable_llm import Client
    from llm_pb.pipeline_pb2 import PipelineStatus, StepDelta, StepStatus, StreamPipelineResponse

_ENDINGS = {"image/png": ".png", "image/jpeg": ".jpg", "image/webp": ".webp"}
_BY_STATE = {"CANCELLED": Exit.CANCELLED, "TIMED_OUT": Exit.TIMED_OUT, "FAILED": Exit.FAILED}


def follow_pipeline(
    client: "Client",
    pipeline_id: str,
    follow: Sequence[str],
    *,
    cursor: str = "",
    images: str | None = None,
    quiet: bool = False,
    as_json: bool = False,
) -> None:
    """Follow a pipeline to its end, and download its images into the folder `images`, if one is given.

    Raises CommandError for one that did not succeed, ApiError, and Interrupted.
    """
    status: PipelineStatus | None = None
    outputs = _Outputs()
    said: dict[str, str] = {}

    def show(message: "StreamPipelineResponse") -> None:
        if as_json:
            write_json(as_fields(message))
            return
        for step in message.steps:
            line = visible(described(step, step.path))
            # A step may have changed in what the line does not show.
            if not quiet and said.get(step.path) != line:
                said[step.path] = line
                say(line)
        if message.HasField("delta"):
            outputs.add(message.delta)
        if message.HasField("result"):
            outputs.close()
            write_json(as_fields(message.result.value))

    try:
        with (
            interruptible(),
            contextlib.closing(client.pipelines.watch(pipeline_id, follow, cursor)) as messages,
        ):
            for message in messages:
                if message.HasField("status"):
                    status = message.status
                # Between what was printed and its cursor there is no Ctrl-C: the one that is shown continues after it.
                with held():
                    show(message)
                    cursor = message.cursor or cursor
            if images is not None:
                outputs.close()
                _download_images(client, pipeline_id, Path(images))
    except KeyboardInterrupt:
        outputs.close()
        more = "".join(f" --follow '{pattern}'" for pattern in follow) + (f" --cursor {cursor}" if cursor else "")
        raise Interrupted(f"The pipeline goes on: durable-llm pipeline watch {pipeline_id}{more}") from None
    outputs.close()
    state = "" if status is None else state_of(status)
    if status is not None and state != "SUCCEEDED":
        raise CommandError(f"{state}{error_of(status.root)}", _BY_STATE.get(state, Exit.FAILED))


def _download_images(client: "Client", pipeline_id: str, folder: Path) -> None:
    """Download the images of all steps into a folder, each under the path of its step."""
    folder.mkdir(parents=True, exist_ok=True)
    for step in client.pipelines.get(pipeline_id).steps:
        images = [file for file in step.files if file.media_type in _ENDINGS]
        for number, file in enumerate(images, 1):
            name = step.path.replace("/", "-") + (f"-{number}" if len(images) > 1 else "")
            path = folder / (name + _ENDINGS[file.media_type])
            client.files.download(file.file_id, path)
            say(f"{path} {file.size_bytes} bytes")


class _Outputs:
    """The output of followed steps, each under the name of its step."""

    def __init__(self) -> None:
        self._path: str | None = None
        self._last = "\n"

    def add(self, delta: "StepDelta") -> None:
        """Write a piece. After a rewind a note says so, because the text above is void then."""
        if delta.delta.rewind:
            self.close()
            say(f"{delta.path} started over: what follows replaces its text from byte {delta.delta.offset} on")
        if delta.path != self._path:
            self.close()
            write(f"--- {delta.path}\n")
            self._path = delta.path
        if text := delta.delta.text:
            write(visible(text) if on_terminal() else text)
            self._last = text[-1]

    def close(self) -> None:
        """End the last line."""
        if self._last != "\n":
            write("\n")
        self._path, self._last = None, "\n"


def described(step: "StepStatus", name: str, *, kind: bool = False) -> str:
    """Return the line of text for a step. `kind`: with what the step is, unless that is seen from the tree."""
    from llm_pb.pipeline_pb2 import StepKind, StepState

    state = name_of(StepState, step.state, "STEP_STATE_")
    parts = [name, f"{state}, waits for a worker" if step.queued else state]
    if kind and step.kind > StepKind.STEP_KIND_GROUP:
        parts.append(name_of(StepKind, step.kind, "STEP_KIND_").lower())
    if step.HasField("training"):
        training = step.training
        parts.append(f"{training.step}/{training.steps}")
        if training.step:
            parts.append(f"loss {training.loss:.4f} {training.tokens_per_second:.0f} tokens/s")
    if step.counts.total:
        parts.append(f"{step.counts.succeeded}/{step.counts.total}")
    if step.HasField("approved"):
        parts.append("approved" if step.approved else "declined")
    if step.summary_json and not _is_answer(step):
        parts.append(step.summary_json)
    if step.question:
        parts.append(step.question)
    return " ".join(parts) + error_of(step)


def _is_answer(step: "StepStatus") -> bool:
    """Return whether the summary of a step repeats its answer alone."""
    return step.HasField("approved") and step.summary_json == f'{{"approved": {str(step.approved).lower()}}}'


def error_of(step: "StepStatus") -> str:
    """Return the end of a line of text for why a step failed, if it has."""
    return f": {visible(step.error.message)}" if step.HasField("error") else ""


def state_of(status: "PipelineStatus") -> str:
    """Return the name of the state of a pipeline, whether it needs an answer, and whether a cancel was requested."""
    from llm_pb.llm_pb2 import JobState

    words = [name_of(JobState, status.state, "JOB_STATE_")]
    if not status.root.HasField("end_time"):
        words += ["needs an answer"] if status.root.counts.needs_answer else []
        words += ["cancel requested"] if status.cancel_requested else []
    return ", ".join(words)


def as_fields(message: Any) -> dict[str, Any]:
    """Return a message as protobuf's JSON. A value of a type that this command does not know stays in base64."""
    # The import of a type is what makes it known.
    from google.protobuf import (
        json_format,
        struct_pb2,  # noqa: F401
        wrappers_pb2,  # noqa: F401
    )

    try:
        fields: dict[str, Any] = json_format.MessageToDict(message)
    except TypeError:
        return _opaque(message)
    return fields


def _opaque(message: Any) -> dict[str, Any]:
    import base64

    from google.protobuf import any_pb2, json_format

    def opaque(value: "AnyMessage") -> dict[str, str]:
        return {"@type": value.type_url, "value": base64.b64encode(value.value).decode()}

    if isinstance(message, any_pb2.Any):
        return opaque(message)
    copy = type(message)()
    copy.CopyFrom(message)
    copy.ClearField("result")
    fields: dict[str, Any] = json_format.MessageToDict(copy)
    return {**fields, "result": {"value": opaque(message.result.value)}}
