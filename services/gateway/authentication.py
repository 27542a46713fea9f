"""How the gateway knows its callers, as its settings say."""

from jobs.ids import ID_PATTERN
from runtime.auth_settings import open_authenticators
from runtime.grpc_auth import AuthInterceptor
from runtime.health import Readiness
from runtime.scopes import ANONYMOUS
from services.gateway.interceptor import auth_refusal
from services.gateway.scopes import OF_METHOD
from services.gateway.settings import GatewaySettings


async def auth_interceptor(settings: GatewaySettings, readiness: Readiness) -> AuthInterceptor:
    """Return the interceptor, which knows what there is to know. Raises KeyFileError."""
    authenticators = await open_authenticators(settings, readiness, ID_PATTERN)
    return AuthInterceptor(authenticators, ANONYMOUS, OF_METHOD, auth_refusal)
