"""The fields that a batch sets for lines that do not."""

from collections.abc import Collection, Iterator
from typing import Final

from google.protobuf.message import Message

from jobs.field_rules import Violation
from llm_pb import common_pb2, llm_pb2

OF_A_LINE: Final = ("user_id", "request_id", "prompt", "messages", "prompt_file", "job_class")
"""Fields of a job that the defaults of a batch must not set."""
_PARTED: Final = {
    message.DESCRIPTOR.full_name
    for message in (llm_pb2.SamplingParams, llm_pb2.JobTimeouts, common_pb2.Budget, llm_pb2.NotifyOptions)
}
"""Messages whose fields count for themselves. Any other field is replaced as a whole."""


def check_defaults(defaults: llm_pb2.JobRequest) -> Iterator[Violation]:
    """Yield the fields that defaults must not set. Their values are checked with each line that takes them."""
    for field, _ in defaults.ListFields():
        if field.name in OF_A_LINE:
            yield Violation(f"defaults.{field.name}", "must not be set: it is of a line, or of the batch")


def fill_in(message: Message, defaults: Message, without: Collection[str] = ()) -> None:
    """Set the fields of a message that it does not set, as `defaults` has them.

    A member of a oneof that the message sets stands for the whole oneof.
    """
    known = {field.name for field, _ in message.ListFields()}
    for field, _ in defaults.ListFields():
        if field.name in without:
            continue
        oneof = field.containing_oneof
        if field.name in known:
            if not field.is_repeated and field.message_type and field.message_type.full_name in _PARTED:
                fill_in(getattr(message, field.name), getattr(defaults, field.name))
        elif oneof is None or message.WhichOneof(oneof.name) is None:
            copied = type(defaults)()
            copied.CopyFrom(defaults)
            for other, _ in defaults.ListFields():
                if other.name != field.name:
                    copied.ClearField(other.name)
            message.MergeFrom(copied)
