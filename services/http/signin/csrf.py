"""Refuses forms that pages of other origins make a browser send."""

import hmac
from collections.abc import Mapping
from http import HTTPStatus
from typing import Final

from starlette.requests import Request

from services.http import origins
from services.http.failures import Failure
from services.http.signin.session import Session

FIELD: Final = "csrf_token"
"""The field of a form with the secret of its session."""


def require_own_page(request: Request) -> None:
    """Raise Failure, 403, for a request from a page of another origin.

    HTTP_CORS_ORIGINS is for the API, not for the console. A browser sends Origin with each form that is posted, and
    Sec-Fetch-Site where the page came by TLS or from loopback.
    """
    origin, site = request.headers.get("origin", ""), request.headers.get("sec-fetch-site", "same-origin")
    if not origins.is_own(origin, request.headers.get("host", "")) or site != "same-origin":
        raise Failure(HTTPStatus.FORBIDDEN, "only pages of this console may send its forms", "ORIGIN_NOT_ALLOWED")


def check_token(form: Mapping[str, str], session: Session) -> None:
    """Raise Failure, 403, for a form that is of another session, or of none."""
    token = form.get(FIELD, "")
    # compare_digest() takes no text with other characters than ASCII.
    if not hmac.compare_digest(token.encode("utf-8", "replace"), session.secret.encode()):
        words = "the form is out of date; go back, load the page again and send the form once more"
        raise Failure(HTTPStatus.FORBIDDEN, words, "CSRF_TOKEN_INVALID")
