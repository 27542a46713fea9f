"""`python -m services.http`: serve the HTTP API until asked to stop."""

from typing import Final

from opentelemetry import trace

from runtime import process
from runtime.health import Readiness
from runtime.metrics import serving_metrics
from services.http.app import make_app
from services.http.front import Front
from services.http.gateway import Gateway
from services.http.metrics import HttpMetrics
from services.http.server import serving
from services.http.settings import HttpSettings

SERVICE: Final = "http"


async def main() -> None:
    """Serve the API. Raises RuntimeError for an address that is taken or that must not be served."""
    settings, readiness = HttpSettings(), Readiness(SERVICE)
    async with (
        serving_metrics(settings, readiness) as metrics,
        Gateway(settings, trace.get_tracer(__package__)) as gateway,
    ):
        readiness.describe(gateway=settings.gateway)
        readiness.need("gateway", "does not answer", gateway.serves)
        await gateway.require_authentication(settings)
        front = Front(settings, gateway, HttpMetrics(metrics.meter(__package__)), readiness)
        async with serving(make_app(front), front, readiness) as address:
            readiness.describe(address=address)
            with readiness.serving():
                await process.forever()


if __name__ == "__main__":
    process.run(SERVICE, main, (HttpSettings,))
