"""Types of settings about NATS, for the feed and for everything else that connects to it."""

import re
from typing import Annotated, Final
from urllib.parse import urlsplit

from pydantic import AfterValidator, SecretStr

_SCHEMES: Final = ("nats", "tls", "ws", "wss")
_WORD: Final = r"[^\s.*>]+"


def checked_nats_url(url: SecretStr) -> SecretStr:
    """Return the URL. Raises ValueError, without the URL in it, if nats-py could not connect to it."""
    try:
        parts = urlsplit(url.get_secret_value())
        usable = parts.scheme in _SCHEMES and bool(parts.hostname) and parts.port != 0
    except ValueError:
        usable = False
    if not usable:
        raise ValueError("the URL of a NATS server has the form nats://host:port or tls://host:port")
    return url


def checked_stream_name(name: str) -> str:
    """Return the name. Raises ValueError if no stream can have it."""
    if not re.fullmatch(r"[^\s.*>/\\]+", name):
        raise ValueError(
            "the name of a stream has at least one character, and none of them is a space or one of .*>/\\"
        )
    return name


def _subject_prefix(prefix: str) -> str:
    if not re.fullmatch(rf"{_WORD}(\.{_WORD})*", prefix):
        raise ValueError("a prefix of subjects is words joined by single dots, without spaces, * and >")
    return prefix


NatsUrl = Annotated[SecretStr, AfterValidator(checked_nats_url)]
StreamName = Annotated[str, AfterValidator(checked_stream_name)]
SubjectPrefix = Annotated[str, AfterValidator(_subject_prefix)]
