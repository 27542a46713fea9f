"""Descriptions of delivery targets that hold no secret."""

import hashlib
from typing import Final
from urllib.parse import urlsplit

from llm_pb import llm_pb2

_HASH_DIGITS: Final = 8
"""Length of a URL's hash: enough to distinguish a job's few targets, too little to recover the URL."""


def describe(target: llm_pb2.NotifyTarget) -> str:
    """Return the description of a target: <scheme>://<host>#<hash of the URL>, or nats:<subject>, kafka:<topic>,
    postgres:<table>.

    It leaves out a webhook's path, because whoever knows the path may send there. It is empty for a target without a
    kind, which is the operator's default, and for an invalid URL.
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
        case "postgres":
            return f"postgres:{target.postgres.table}"
    return ""


def origin(url: str) -> str:
    """Return the <scheme>://<host>[:<port>] of a URL; empty if the URL is invalid."""
    try:
        parts = urlsplit(url)
    except ValueError:
        return ""
    host = parts.netloc.rpartition("@")[2]
    return f"{parts.scheme}://{host}" if host else ""
