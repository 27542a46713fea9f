"""Whom a request of the console speaks for."""

from collections.abc import Mapping
from typing import Any

from markupsafe import Markup
from starlette.requests import Request


def caller_of(request: Request) -> Mapping[str, str]:
    """Return the metadata of gRPC that holds the credential of the request's session; empty without one."""
    return {}


def context_of(request: Request | None) -> dict[str, Any]:
    """Return what all templates know of the session. Error pages have no request.

    `csrf_field` is the hidden field of a form, `csrf_token` what the modules send as the header X-CSRF-Token, `user`
    the name to show; each may be empty.
    """
    return {"csrf_field": Markup(""), "csrf_token": "", "user": ""}


def check_token(request: Request, form: Mapping[str, str]) -> None:
    """Raise Failure, 403, for a form without the token of its session."""
