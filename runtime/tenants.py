"""The form of a tenant's name. Credentials name tenants, and the ids of their workflows hold them."""

import re
from typing import Annotated, Final

from pydantic import AfterValidator

TENANT_PATTERN: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9-]{0,31}")
_FORM: Final = "a tenant has 1 to 32 of A-Z a-z 0-9 - and first a letter or digit"


def check_tenant(name: str) -> str:
    """Return the name. Raises ValueError if no tenant can have it."""
    if TENANT_PATTERN.fullmatch(name) is None:
        raise ValueError(_FORM)
    return name


TenantName = Annotated[str, AfterValidator(check_tenant)]
"""The name of a tenant, in settings and files."""
