"""The rules that llm.proto states for the targets of deliveries."""

import re
from collections.abc import Iterator
from typing import Final

from jobs.field_rules import Violation, check_enum, check_url
from llm_pb import llm_pb2

MAX_SUBJECT_BYTES: Final = 128
SUBJECT_PATTERN: Final = re.compile(r"[A-Za-z0-9_-]+(\.[A-Za-z0-9_-]+)*")
TABLE_PATTERN: Final = re.compile(r"[a-z_][a-z0-9_]{0,49}")
"""The form of a table's name. PostgreSQL cuts a name of more than 63 bytes, and that of an index is longer."""
TOPIC_PATTERN: Final = re.compile(r"(?!\.{1,2}$)[A-Za-z0-9._-]{1,249}")


def check_target(path: str, target: llm_pb2.NotifyTarget, strict: bool) -> Iterator[Violation]:
    """Yield the violations of a target at a path. `strict` is as in check_url()."""
    match target.WhichOneof("target"):
        case "webhook":
            yield from check_url(f"{path}.webhook.url", target.webhook.url, strict=strict)
            if target.webhook.format:
                yield from check_enum(f"{path}.webhook.format", target.webhook.format, llm_pb2.WebhookFormat)
        case "nats":
            subject = target.nats.subject
            if len(subject) > MAX_SUBJECT_BYTES or SUBJECT_PATTERN.fullmatch(subject) is None:
                rule = f"must be 1 to {MAX_SUBJECT_BYTES} of A-Z a-z 0-9 _ - in tokens separated by dots"
                yield Violation(f"{path}.nats.subject", rule)
        case "kafka":
            if TOPIC_PATTERN.fullmatch(target.kafka.topic) is None:
                yield Violation(f"{path}.kafka.topic", "must be 1 to 249 of A-Z a-z 0-9 . _ -")
        case "postgres":
            if TABLE_PATTERN.fullmatch(target.postgres.table) is None:
                yield Violation(f"{path}.postgres.table", "must be 1 to 50 of a-z 0-9 _, the first no digit")
        case None:
            yield Violation(path, "must name a target: set webhook, nats, kafka or postgres")
