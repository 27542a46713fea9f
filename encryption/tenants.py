"""The form of a tenant's name.

It stands here because no package is below this one: a tenant's keys are a folder of that name. Credentials name tenants
by runtime.tenants, and the ids of their workflows hold them (jobs.ids).
"""

import re
from typing import Final

TENANT_PATTERN: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9-]{0,31}")
