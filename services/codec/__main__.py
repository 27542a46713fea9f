"""`python -m services.codec`: show payloads as JSON until told to stop."""

from typing import Final

from opentelemetry.semconv.metrics.http_metrics import HTTP_SERVER_REQUEST_DURATION

from encryption import EncryptionSettings, open_encryption
from runtime import process
from runtime.auth import keep_refreshing
from runtime.auth_settings import open_authenticators
from runtime.background import beside
from runtime.encryption_health import want_keys
from runtime.health import Readiness
from runtime.metrics import SHORT_SECONDS, serving_metrics
from services.codec.audit import recording
from services.codec.server import make_app, serving
from services.codec.settings import CodecSettings

SERVICE: Final = "codec"


async def main() -> None:
    """Serve the codec protocol. Raises RuntimeError for an address that is taken, KeyFileError."""
    settings, readiness = CodecSettings(), Readiness(SERVICE)
    async with serving_metrics(settings, readiness) as metrics:
        duration = metrics.meter(__package__).create_histogram(
            HTTP_SERVER_REQUEST_DURATION,
            unit="s",
            description="Duration of requests to the codec server.",
            explicit_bucket_boundaries_advisory=SHORT_SECONDS,
        )
        lost = metrics.meter(__package__).create_counter(
            "llm.audit.lost", unit="{record}", description="Audit records that could not be stored."
        )
        # An alert sees the first one that is lost only if there was a sample before.
        lost.add(0)
        authenticators, encryption = await open_authenticators(settings, readiness), open_encryption()
        want_keys(readiness, encryption)
        async with (
            beside(keep_refreshing(authenticators)),
            recording(settings.audit, lost) as log,
            serving(
                make_app(settings, duration, encryption, authenticators, log),
                settings.host,
                settings.port,
                settings.tls,
                readiness,
            ) as address,
        ):
            readiness.describe(address=address)
            with readiness.serving():
                await process.forever()


if __name__ == "__main__":
    process.run(SERVICE, main, (CodecSettings, EncryptionSettings))
