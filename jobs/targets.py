"""Where a delivery goes, in words that hold no secret."""

from urllib.parse import urlsplit

from llm_pb import llm_pb2


def describe(target: llm_pb2.NotifyTarget) -> str:
    """Return where a target leads: a URL without user, query and fragment, or nats:<subject>, kafka:<topic>.

    Empty for a target without a kind, the operator's default, and for a URL that is none.
    """
    match target.WhichOneof("target"):
        case "webhook":
            return _without_secrets(target.webhook.url)
        case "nats":
            return f"nats:{target.nats.subject}"
        case "kafka":
            return f"kafka:{target.kafka.topic}"
    return ""


def _without_secrets(url: str) -> str:
    try:
        parts = urlsplit(url)
    except ValueError:
        return ""
    host = parts.netloc.rpartition("@")[2]
    return f"{parts.scheme}://{host}{parts.path}" if host else ""
