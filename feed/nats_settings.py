"""Types of settings about NATS, for the feed and for everything else that connects to it."""

import re
from typing import Annotated, Final
from urllib.parse import urlsplit

from pydantic import AfterValidator, SecretStr

from runtime.addresses import servers_of

_SCHEMES: Final = ("nats", "tls", "ws", "wss")
_WORD: Final = r"[^\s.*>]+"


def checked_nats_url(url: SecretStr) -> SecretStr:
    """Return the URL, or the URLs of several servers with commas between them.

    Raises ValueError, without the URL in it, if nats-py could not connect to it.
    """
    try:
        servers = [urlsplit(server) for server in servers_of(url)]
        usable = all(server.scheme in _SCHEMES and server.hostname and server.port != 0 for server in servers)
    except ValueError:
        usable = False
    if not usable:
        raise ValueError("the URL of a NATS server has the form nats://host:port or tls://host:port")
    if len({server.scheme for server in servers}) > 1:
        raise ValueError("the URLs of the servers of a NATS cluster must have one scheme")
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
