"""Temporal's codec protocol over HTTP: shows messages as JSON in the Web UI and the CLI.

`POST /decode` and `POST /encode` take and return a `temporal.api.common.v1.Payloads` as proto3 JSON. Decoding turns
`binary/protobuf` of a known type into JSON, encoding turns that JSON back; what neither can handle passes through
untouched, byte for byte, so one odd payload never hides a whole page. Where payloads are encrypted at rest, it decrypts
and encrypts them, too, each operator those of a tenant: services.codec.operators has the rules. An operator of several
tenants names one in the path, `/tenants/<tenant>/decode`, because the Web UI can send neither a header nor a query of
its user's choice. It keeps nothing. services.codec is the process around it.
"""

import logging
import re
import ssl
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Sequence
from contextlib import asynccontextmanager
from typing import Final

from aiohttp import hdrs, web
from aiohttp.typedefs import Handler, Middleware
from google.protobuf import json_format
from opentelemetry.metrics import Histogram
from opentelemetry.semconv.attributes.error_attributes import ERROR_TYPE
from opentelemetry.semconv.attributes.http_attributes import HTTP_REQUEST_METHOD, HTTP_RESPONSE_STATUS_CODE, HTTP_ROUTE
from opentelemetry.semconv.attributes.url_attributes import URL_SCHEME
from temporalio.api.common.v1 import Payloads

from encryption import Encryption, KeysUnavailable
from payload_converter import PayloadError
from runtime.addresses import unbracketed
from runtime.audit import AuditLog, AuditUnavailable
from runtime.auth import Authenticator, Caller, Presented, Refusal, authenticate, bearer_token
from runtime.health import Readiness
from runtime.http_auth import STATUS, challenge_headers
from runtime.scopes import ANONYMOUS
from runtime.tenants import TENANT_PATTERN
from runtime.tls import ServerTls, server_context
from services.codec.audit import OperatorAudit
from services.codec.operators import Convert, Work, decode, encode, operator
from services.codec.settings import CodecSettings

# What the Web UI sends; the last two only when it passes its user's token on.
_REQUEST_HEADERS = "content-type, x-namespace, authorization, authorization-extras"
_SHUTDOWN_SECONDS = 5
_HOST = re.compile(r"(?:\[(?P<address>[0-9A-Fa-f:.]+)\]|(?P<name>[A-Za-z0-9._-]+))(?::[0-9]*)?")
"""A Host header: an IPv6 address in brackets, or a name or an IPv4 address; and maybe a port."""

_OPERATOR: Final = "operator"
"""The key of a request's Operator."""
_OF_TENANT: Final = f"/tenants/{{tenant:{TENANT_PATTERN.pattern}}}"

logger = logging.getLogger(__name__)


def make_app(
    settings: CodecSettings,
    duration: Histogram,
    encryption: Encryption | None = None,
    authenticators: Sequence[Authenticator] = (),
    log: AuditLog | None = None,
) -> web.Application:
    """Return the server's application.

    Any `Host` but those of the settings is a 421. To a browser, a page whose own name was made to lead here (DNS
    rebinding) is of this server's origin. The settings have the Web UIs that a browser may let read answers, too. The
    CLI and other programs need none.

    A caller without a credential is a 401, one without the scope a 403, a body over the limit a 413, one that is no
    Payloads a 400. Without `authenticators` everybody may do everything. Without `encryption` nothing is decrypted or
    encrypted. `duration` takes how long each answer took, in seconds. `log` gets a record of each request that decrypts
    or is refused.
    """
    audit = OperatorAudit(log)
    app = web.Application(
        client_max_size=settings.max_request_bytes,
        middlewares=[
            _measured(duration),
            _only_for((*settings.allowed_hosts, settings.host)),
            _admitted(authenticators, audit),
        ],
    )

    async def allow_origin(request: web.Request, response: web.StreamResponse) -> None:
        # A signal and not a handler's business, so that errors carry the headers too: without them a browser
        # shows the page a network failure instead of the status.
        response.headers[hdrs.VARY] = "Origin"
        origin = request.headers.get(hdrs.ORIGIN, "")
        if origin in settings.allowed_origins:
            response.headers[hdrs.ACCESS_CONTROL_ALLOW_ORIGIN] = origin
            response.headers[hdrs.ACCESS_CONTROL_ALLOW_CREDENTIALS] = "true"

    app.on_response_prepare.append(allow_origin)
    for convert in (decode, encode):
        for place in ("", _OF_TENANT):
            app.router.add_post(f"{place}/{convert.__name__}", _handler(convert, encryption, audit))
            app.router.add_options(f"{place}/{convert.__name__}", _preflight)
    return app


@asynccontextmanager
async def serving(
    app: web.Application, host: str, port: int, tls: ServerTls | None, readiness: Readiness
) -> AsyncIterator[str]:
    """Serve while the context is open, then finish the requests in hand; port 0 takes a free one and logs it.

    Yields where it listens, as host:port. With `tls` it serves HTTPS.

    Raises RuntimeError naming the address when it is taken, and OSError when the files of `tls` cannot be used.
    """
    context = server_context(tls, readiness) if tls is not None else None
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=_SHUTDOWN_SECONDS)
    await runner.setup()
    try:
        try:
            await web.TCPSite(runner, unbracketed(host), port, ssl_context=context).start()
        except OSError as error:
            raise RuntimeError(
                f"cannot listen on {host}:{port}: is it taken? ({error}); CODEC_HOST and CODEC_PORT choose another"
            ) from error
        bound, port = runner.addresses[0][:2]
        address = f"[{bound}]:{port}" if ":" in bound else f"{bound}:{port}"
        logger.info("listening on %s://%s", "http" if context is None else "https", address)
        yield address
    finally:
        await runner.cleanup()


def _measured(duration: Histogram) -> Middleware:
    """Return the middleware that measures, by OpenTelemetry's conventions for HTTP."""

    @web.middleware
    async def measure(request: web.Request, handler: Handler) -> web.StreamResponse:
        began = time.perf_counter()
        # A method or a path that a caller made up is no label.
        method = request.method if request.method in hdrs.METH_ALL else "_OTHER"
        labels: dict[str, str | int] = {HTTP_REQUEST_METHOD: method, URL_SCHEME: request.scheme}
        if (resource := request.match_info.route.resource) is not None:
            labels[HTTP_ROUTE] = resource.canonical
        status = 500
        try:
            response = await handler(request)
            status = response.status
        except web.HTTPException as error:
            status = error.status
            raise
        finally:
            labels[HTTP_RESPONSE_STATUS_CODE] = status
            if status >= 500:
                labels[ERROR_TYPE] = str(status)
            duration.record(time.perf_counter() - began, labels)
        return response

    return measure


def _only_for(hosts: Collection[str]) -> Middleware:
    """Return the middleware that refuses requests for other hosts."""
    allowed = {host.strip("[]").lower() for host in hosts}

    @web.middleware
    async def check(request: web.Request, handler: Handler) -> web.StreamResponse:
        found = _HOST.fullmatch(request.headers.get(hdrs.HOST, ""))
        if found is None or (found["address"] or found["name"]).lower() not in allowed:
            raise web.HTTPMisdirectedRequest(text="this server has another name; CODEC_ALLOWED_HOSTS adds names")
        return await handler(request)

    return check


def _admitted(authenticators: Sequence[Authenticator], audit: OperatorAudit) -> Middleware:
    """Return the middleware that knows the operator, before anything of the body is read."""

    @web.middleware
    async def admit(request: web.Request, handler: Handler) -> web.StreamResponse:
        if request.method == hdrs.METH_OPTIONS:
            # A browser sends no credential with a preflight.
            return await handler(request)
        caller = None
        try:
            caller = await _caller(request, authenticators)
            request[_OPERATOR] = operator(caller, request.match_info.get("tenant"))
        except Refusal as refusal:
            await audit.refused(request.path.rpartition("/")[2], caller, refusal)
            return web.Response(status=STATUS[refusal.code], text=str(refusal), headers=challenge_headers(refusal))
        return await handler(request)

    return admit


async def _caller(request: web.Request, authenticators: Sequence[Authenticator]) -> Caller:
    """Return who makes the request. Raises Refusal."""
    if not authenticators:
        return ANONYMOUS
    token = bearer_token(request.headers.getall(hdrs.AUTHORIZATION, []))
    tls: ssl.SSLObject | None = request.get_extra_info("ssl_object")
    certificate = tls.getpeercert(binary_form=True) if tls is not None and token is None else None
    pem = ssl.DER_cert_to_PEM_cert(certificate).encode() if certificate is not None else None
    _, caller = await authenticate(authenticators, Presented(token, pem))
    return caller


def _handler(
    convert: Convert, encryption: Encryption | None, audit: OperatorAudit
) -> Callable[[web.Request], Awaitable[web.Response]]:
    async def handle(request: web.Request) -> web.Response:
        try:
            # Unknown fields are dropped: a newer Temporal may add some.
            payloads = json_format.Parse(await request.read(), Payloads(), ignore_unknown_fields=True)
        except (json_format.ParseError, ValueError, RecursionError) as err:
            raise web.HTTPBadRequest(text=f"the body is not a temporal.api.common.v1.Payloads: {err}") from err
        work = Work(request[_OPERATOR], encryption)
        try:
            converted = Payloads(payloads=[await convert(work, payload) for payload in payloads.payloads])
        except PayloadError as error:
            raise web.HTTPBadRequest(text=error.message) from error
        except KeysUnavailable as error:
            raise web.HTTPServiceUnavailable(text="no key to encrypt with is available now") from error
        finally:
            # Before the answer, and for what was done before an error, too.
            try:
                await audit.allowed(work)
            except AuditUnavailable as error:
                message = "the audit log takes no record now, and nothing is shown without one"
                raise web.HTTPServiceUnavailable(text=message) from error
        return web.Response(text=json_format.MessageToJson(converted), content_type="application/json")

    return handle


async def _preflight(_request: web.Request) -> web.Response:
    headers = {
        hdrs.ACCESS_CONTROL_ALLOW_METHODS: "POST",
        hdrs.ACCESS_CONTROL_ALLOW_HEADERS: _REQUEST_HEADERS,
        hdrs.ACCESS_CONTROL_MAX_AGE: "600",
    }
    return web.Response(status=204, headers=headers)
