"""How the gateway knows its callers, as its settings say."""

from runtime.auth_certificates import ClientCertificates
from runtime.auth_jwt import JwtRules, Jwts, KeySet
from runtime.auth_keys import ApiKeys
from runtime.grpc_auth import Authenticator, AuthInterceptor
from services.gateway.interceptor import auth_refusal
from services.gateway.scopes import ANONYMOUS, OF_METHOD, SCOPES
from services.gateway.settings import GatewaySettings


async def auth_interceptor(settings: GatewaySettings) -> AuthInterceptor:
    """Return the interceptor, which knows what there is to know. Raises KeyFileError."""
    authenticators: list[Authenticator] = []
    if settings.api_keys_file is not None:
        authenticators.append(ApiKeys(settings.api_keys_file, SCOPES))
    if settings.jwt_issuer:
        rules = JwtRules(
            issuer=settings.jwt_issuer,
            audience=settings.jwt_audience,
            algorithms=settings.jwt_algorithms,
            leeway=settings.jwt_leeway,
            scopes_claim=settings.jwt_scopes_claim,
            tenant_claim=settings.jwt_tenant_claim,
            user_claim=settings.jwt_user_claim,
        )
        authenticators.append(Jwts(rules, KeySet(settings.jwt_keys), SCOPES))
    if settings.client_certificates:
        authenticators.append(ClientCertificates(settings.client_certificates))
    for authenticator in authenticators:
        await authenticator.refresh()
    return AuthInterceptor(authenticators, ANONYMOUS, OF_METHOD, auth_refusal)
