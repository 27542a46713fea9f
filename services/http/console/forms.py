"""The forms of the console. Only its own pages may post them."""

from http import HTTPStatus
from typing import Final
from urllib.parse import parse_qsl

from starlette.requests import Request

from services.http.bodies import read_body
from services.http.console.caller import check_token
from services.http.failures import Failure, bad_request
from services.http.settings import HttpSettings
from services.http.signin.csrf import require_own_page

_KIND: Final = "application/x-www-form-urlencoded"
_MAX_FIELDS: Final = 100


async def read_form(request: Request, settings: HttpSettings) -> dict[str, str]:
    """Return the fields of the form that a page of this console has posted in its session.

    Raises Failure: 403 for a form without its session's token, and what read_fields raises.
    """
    form = await read_fields(request, settings)
    check_token(request, form)
    return form


async def read_fields(request: Request, settings: HttpSettings) -> dict[str, str]:
    """Return the fields of the form that a page of this console has posted, maybe in a session that has ended.

    The caller checks the token before it does what the form asks for. Raises Failure: 403 for a page of another origin,
    415 for what is no form, 400 for one that cannot be read, and what read_body raises.
    """
    require_own_page(request)
    data = await read_body(request, settings)
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != _KIND:
        raise Failure(HTTPStatus.UNSUPPORTED_MEDIA_TYPE, f"the body must be a form, with Content-Type: {_KIND}")
    try:
        # Browsers end the lines of a text with CR LF.
        pairs = parse_qsl(data.decode(), keep_blank_values=True, max_num_fields=_MAX_FIELDS, errors="strict")
    except ValueError:
        raise bad_request(message="the form cannot be read") from None
    return {name: value.replace("\r\n", "\n") for name, value in pairs}
