"""The application: the packages of the API, behind what all requests have in common."""

from http import HTTPStatus

from opentelemetry import trace
from starlette.middleware.cors import CORSMiddleware
from starlette.routing import Router
from starlette.types import ASGIApp, Receive, Scope, Send

from services.http import console, openai, rest
from services.http.failures import Failure
from services.http.front import Front
from services.http.guard import Guard
from services.http.resources import Answer, Package, routes
from services.http.telemetry import Telemetry


def make_app(front: Front) -> ASGIApp:
    """Return the application."""
    # Those with a longer prefix come first.
    of_openai = openai.package(front)
    packages: list[Package] = [of_openai, rest.package(front, openai.describe(of_openai.resources))]
    if front.settings.console:
        packages.insert(0, console.package(front))

    def answer(path: str) -> Answer:
        return next(package.answer for package in packages if path.startswith(package.prefix))

    async def not_found(scope: Scope, receive: Receive, send: Send) -> None:
        failure = Failure(HTTPStatus.NOT_FOUND, "there is nothing at this path", "PATH_NOT_FOUND")
        await answer(scope["path"])(failure)(scope, receive, send)

    found = [route for package in packages for route in routes(package, front.gateway.judge)]
    app: ASGIApp = _RawPath(Router(found, redirect_slashes=False, default=not_found))
    if front.settings.cors_origins:
        app = _CorsOfTheApi(
            app,
            allow_origins=front.settings.cors_origins,
            allow_methods=("GET", "POST", "PUT", "DELETE"),
            allow_headers=("*",),
            expose_headers=("Location", "Retry-After", "WWW-Authenticate"),
        )
    return Telemetry(Guard(app, front.settings, answer), trace.get_tracer(__package__), front.metrics)


class _CorsOfTheApi(CORSMiddleware):
    """Lets pages of other origins call the API. Only the front's own pages may call the console."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        path = scope["path"]
        if path == "/" or path.startswith(console.PREFIX):
            await self.app(scope, receive, send)
        else:
            await super().__call__(scope, receive, send)


class _RawPath:
    """Makes the router see paths as they were sent. A decoded path does not show which `/` belongs to an id."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        # Not a copy: what observes the request reads the route from it.
        scope["path"] = scope["raw_path"].decode("ascii")
        await self._app(scope, receive, send)
