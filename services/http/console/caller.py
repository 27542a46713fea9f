"""The caller of a request of the console: the credential, and what templates show of the session."""

from collections.abc import Mapping
from typing import Any

from markupsafe import Markup
from starlette.requests import Request

from services.http.signin import csrf
from services.http.signin.signed_in import session_of


def caller_of(request: Request) -> Mapping[str, str]:
    """Return the metadata of gRPC that holds the credential of the request's session; empty without one."""
    return session_of(request).metadata


def context_of(request: Request | None) -> dict[str, Any]:
    """Return the values of the session that all templates use. The page of a path that does not exist has no request.

    `csrf_field` is the hidden field of a form, `user` the name to show of who has signed in. Each may be empty.
    """
    if request is None:
        return {"csrf_field": Markup(""), "user": ""}
    session = session_of(request)
    field = Markup('<input type="hidden" name="{}" value="{}">').format(csrf.FIELD, session.secret)
    return {"csrf_field": field, "user": session.user}


def check_token(request: Request, form: Mapping[str, str]) -> None:
    """Raise Failure, 403, for a form without the token of its session."""
    csrf.check_token(form, session_of(request))
