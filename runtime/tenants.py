"""The names of tenants in settings, in credentials and in files of keys."""

from typing import Annotated, Final

from pydantic import AfterValidator

from encryption.tenants import TENANT_PATTERN

__all__ = ["TENANT_PATTERN", "TenantName", "TenantOrNone", "check_tenant"]

_FORM: Final = "a tenant has 1 to 32 of A-Z a-z 0-9 - and first a letter or digit"


def check_tenant(name: str) -> str:
    """Return the name. Raises ValueError if no tenant can have it."""
    if TENANT_PATTERN.fullmatch(name) is None:
        raise ValueError(_FORM)
    return name


def _tenant_or_none(name: str) -> str:
    return check_tenant(name) if name else ""


TenantName = Annotated[str, AfterValidator(check_tenant)]
"""The name of a tenant, in settings and files."""
TenantOrNone = Annotated[str, AfterValidator(_tenant_or_none)]
"""The name of a tenant. Empty: none."""
