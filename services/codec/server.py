"""Temporal's codec protocol over HTTP: shows messages as JSON in the Web UI and the CLI.

`POST /decode` and `POST /encode` take and return a `temporal.api.common.v1.Payloads` as proto3 JSON. Decoding turns
`binary/protobuf` of a known type into JSON, encoding turns that JSON back; what neither can handle passes through
untouched, byte for byte, so one odd payload never hides a whole page. Where payloads are encrypted at rest, it decrypts
and encrypts them, too: whoever can call it can read all of them. It keeps nothing. services.codec is the process around
it.
"""

import json
import logging
import re
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Collection
from contextlib import asynccontextmanager
from typing import Any

from aiohttp import hdrs, web
from aiohttp.typedefs import Handler, Middleware
from google.protobuf import json_format
from google.protobuf.message import DecodeError
from opentelemetry.metrics import Histogram
from opentelemetry.semconv.attributes.error_attributes import ERROR_TYPE
from opentelemetry.semconv.attributes.http_attributes import HTTP_REQUEST_METHOD, HTTP_RESPONSE_STATUS_CODE, HTTP_ROUTE
from opentelemetry.semconv.attributes.url_attributes import URL_SCHEME
from temporalio.api.common.v1 import Payload, Payloads
from temporalio.converter import PayloadCodec

from encryption import KeysUnavailable
from payload_converter import PayloadError
from payload_converter._types import MessageType, known
from runtime.addresses import unbracketed
from runtime.tls import ServerTls, server_context

# What the Web UI sends; the last two only when it passes its user's token on.
_REQUEST_HEADERS = "content-type, x-namespace, authorization, authorization-extras"
_SHUTDOWN_SECONDS = 5
_HOST = re.compile(r"(?:\[(?P<address>[0-9A-Fa-f:.]+)\]|(?P<name>[A-Za-z0-9._-]+))(?::[0-9]*)?")
"""A Host header: an IPv6 address in brackets, or a name or an IPv4 address; and maybe a port."""

logger = logging.getLogger(__name__)

Convert = Callable[[Payload], Awaitable[Payload]]
"""Converts one payload of a request."""


def decode_payload(payload: Payload) -> Payload:
    """Return `binary/protobuf` of a known type as JSON, anything else as it is.

    Most types become `json/protobuf` and keep their `messageType`, so that encode_payload finds the way back. Types
    that JSON writes as a string or a number, such as google.protobuf.Timestamp, become `json/plain` without it: the
    CLI prints `json/protobuf` only as an object, and `json/plain` only with no other metadata. Fields that this
    process does not know are not shown.
    """
    message_type = _readable(payload, b"binary/protobuf")
    if message_type is None:
        return payload
    try:
        # TypeError: a google.protobuf.Any holds a type that is not known here. ValueError: a time past year 9999.
        value: Any = json_format.MessageToDict(message_type.pb2.FromString(payload.data))
    except (DecodeError, json_format.Error, TypeError, ValueError):
        return payload
    data = json.dumps(value).encode()
    if isinstance(value, dict):
        return _with_data(payload, "json/protobuf", data)
    return Payload(metadata={"encoding": b"json/plain"}, data=data)


def encode_payload(payload: Payload) -> Payload:
    """Return `json/protobuf` of a known type as `binary/protobuf`, anything else as it is.

    The Web UI sends what its user typed, or a decoded payload of an earlier run ("start one like this").
    """
    message_type = _readable(payload, b"json/protobuf")
    if message_type is None:
        return payload
    try:
        message = json_format.Parse(payload.data, message_type.pb2())
    except (json_format.ParseError, ValueError, RecursionError):
        return payload
    return _with_data(payload, "binary/protobuf", message.SerializeToString())


def make_app(
    allowed_hosts: Collection[str],
    allowed_origins: Collection[str],
    max_request_bytes: int,
    duration: Histogram,
    codec: PayloadCodec | None = None,
) -> web.Application:
    """Return the server's application.

    `allowed_hosts` are the names and addresses by which it may be called, without ports; any other `Host` is a 421. To
    a browser, a page whose own name was made to lead here (DNS rebinding) is of this server's origin.

    `allowed_origins` are the Web UIs that a browser may let read answers, each as scheme://host[:port]. The CLI and
    other programs need none. A larger body than `max_request_bytes` is a 413, a body that is no Payloads a 400.
    `duration` takes how long each answer took, in seconds. `codec` decrypts and encrypts; None: nothing is encrypted.
    """
    app = web.Application(
        client_max_size=max_request_bytes, middlewares=[_measured(duration), _only_for(allowed_hosts)]
    )

    async def allow_origin(request: web.Request, response: web.StreamResponse) -> None:
        # A signal and not a handler's business, so that errors carry the headers too: without them a browser
        # shows the page a network failure instead of the status.
        response.headers[hdrs.VARY] = "Origin"
        origin = request.headers.get(hdrs.ORIGIN, "")
        if origin in allowed_origins:
            response.headers[hdrs.ACCESS_CONTROL_ALLOW_ORIGIN] = origin
            response.headers[hdrs.ACCESS_CONTROL_ALLOW_CREDENTIALS] = "true"

    app.on_response_prepare.append(allow_origin)
    for path, convert in (("/decode", _decode(codec)), ("/encode", _encode(codec))):
        app.router.add_post(path, _handler(convert))
        app.router.add_options(path, _preflight)
    return app


@asynccontextmanager
async def serving(app: web.Application, host: str, port: int, tls: ServerTls | None = None) -> AsyncIterator[str]:
    """Serve while the context is open, then finish the requests in hand; port 0 takes a free one and logs it.

    Yields where it listens, as host:port. With `tls` it serves HTTPS.

    Raises RuntimeError naming the address when it is taken, and OSError when the files of `tls` cannot be used.
    """
    context = server_context(tls) if tls is not None else None
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


def _decode(codec: PayloadCodec | None) -> Convert:
    """Return a function that decrypts and decodes. A payload that cannot be decrypted passes through untouched."""

    async def decode(payload: Payload) -> Payload:
        try:
            (payload,) = await codec.decode([payload]) if codec else [payload]
        except (PayloadError, KeysUnavailable) as error:
            logger.warning("a payload is shown encrypted: %s", error)
        return decode_payload(payload)

    return decode


def _encode(codec: PayloadCodec | None) -> Convert:
    """Return a function that encodes and encrypts. It raises KeysUnavailable, and PayloadError for a large payload."""

    async def encode(payload: Payload) -> Payload:
        encoded = encode_payload(payload)
        return (await codec.encode([encoded]))[0] if codec else encoded

    return encode


def _handler(convert: Convert) -> Callable[[web.Request], Awaitable[web.Response]]:
    async def handle(request: web.Request) -> web.Response:
        try:
            # Unknown fields are dropped: a newer Temporal may add some.
            payloads = json_format.Parse(await request.read(), Payloads(), ignore_unknown_fields=True)
        except (json_format.ParseError, ValueError, RecursionError) as err:
            raise web.HTTPBadRequest(text=f"the body is not a temporal.api.common.v1.Payloads: {err}") from err
        try:
            converted = Payloads(payloads=[await convert(payload) for payload in payloads.payloads])
        except PayloadError as error:
            raise web.HTTPBadRequest(text=error.message) from error
        except KeysUnavailable as error:
            raise web.HTTPServiceUnavailable(text="no key to encrypt with is available now") from error
        return web.Response(text=json_format.MessageToJson(converted), content_type="application/json")

    return handle


async def _preflight(_request: web.Request) -> web.Response:
    headers = {
        hdrs.ACCESS_CONTROL_ALLOW_METHODS: "POST",
        hdrs.ACCESS_CONTROL_ALLOW_HEADERS: _REQUEST_HEADERS,
        hdrs.ACCESS_CONTROL_MAX_AGE: "600",
    }
    return web.Response(status=204, headers=headers)


def _readable(payload: Payload, encoding: bytes) -> MessageType | None:
    """Return the type that the payload names, if it has this encoding and the type is known."""
    if payload.metadata.get("encoding") != encoding:
        return None
    return known(payload.metadata.get("messageType", b"").decode(errors="replace"))


def _with_data(payload: Payload, encoding: str, data: bytes) -> Payload:
    """Return a copy that keeps all other metadata."""
    copy = Payload()
    copy.CopyFrom(payload)
    copy.metadata["encoding"] = encoding.encode()
    copy.data = data
    return copy
