"""Where a delivery goes, in words that hold no secret."""

import hashlib
from typing import Final
from urllib.parse import urlsplit

from llm_pb import llm_pb2

_HASH_DIGITS: Final = 8
"""Enough to tell a job's few targets apart, too few to find a URL by."""


def describe(target: llm_pb2.NotifyTarget) -> str:
    """Return where a target leads: <scheme>://<host>#<hash of the URL>, or nats:<subject>, kafka:<topic>.

    Of a webhook no more, because whoever knows the path may send there. Empty for a target without a kind, the
    operator's default, and for a URL that is none.
    """
    match target.WhichOneof("target"):
        case "webhook":
            url = target.webhook.url
            server = origin(url)
            return f"{server}#{hashlib.sha256(url.encode()).hexdigest()[:_HASH_DIGITS]}" if server else ""
        case "nats":
            return f"nats:{target.nats.subject}"
        case "kafka":
            return f"kafka:{target.kafka.topic}"
    return ""


def origin(url: str) -> str:
    """Return the <scheme>://<host>[:<port>] of a URL; empty for one that is none."""
    try:
        parts = urlsplit(url)
    except ValueError:
        return ""
    host = parts.netloc.rpartition("@")[2]
    return f"{parts.scheme}://{host}" if host else ""
