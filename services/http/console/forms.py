"""The forms of the console. Only its own pages may post them."""

from http import HTTPStatus
from typing import Final

from starlette.requests import Request

from services.http.bodies import read_body
from services.http.console.caller import check_token
from services.http.console.form_fields import fields_of
from services.http.failures import Failure
from services.http.settings import HttpSettings
from services.http.signin.csrf import FIELD, require_own_page

_KIND: Final = "application/x-www-form-urlencoded"


async def read_form(request: Request, settings: HttpSettings, *names: str) -> dict[str, str]:
    """Return the fields of the form that a page of this console has posted in its session.

    `names` are those that it may have.

    Raises Failure: 403 for a form without its session's token, and what read_fields raises.
    """
    form = await read_fields(request, settings, *names)
    check_token(request, form)
    return form


async def read_fields(request: Request, settings: HttpSettings, *names: str) -> dict[str, str]:
    """Return the fields of the form that a page of this console has posted, maybe in a session that has ended.

    The caller checks the token before it does what the form asks for. Raises Failure: 403 for a page of another origin,
    415 for what is no form, 400 for one that cannot be read or has other fields, and what read_body raises.
    """
    require_own_page(request)
    data = await read_body(request, settings)
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != _KIND:
        raise Failure(HTTPStatus.UNSUPPORTED_MEDIA_TYPE, f"the body must be a form, with Content-Type: {_KIND}")
    return fields_of(data, {FIELD, *names})
