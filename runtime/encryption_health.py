"""Reports the keys of encryption at /readyz."""

from encryption import Encryption
from runtime.health import Readiness


def want_keys(readiness: Readiness, encryption: Encryption | None) -> None:
    """Report keys that are not available as degraded. Does nothing without encryption."""
    if encryption is None:
        return

    async def available() -> bool | str:
        return await encryption.keys.present_problem() or True

    readiness.want("keys", "are not all available", available)
