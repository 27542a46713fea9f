"""`python -m runtime.healthcheck GATEWAY`: ask /readyz of a process in the same container, for the container's health.

The argument is the prefix of the service's settings: GATEWAY_METRICS_PORT and GATEWAY_METRICS_TLS_CERT say where and
how the process answers. The exit status is 0 while it is ready. The answer goes to stdout, where `docker inspect` shows
it.

It needs only the standard library, because it runs every few seconds. It cannot ask a process with
…_METRICS_TLS_CLIENT_CA: such a container needs a health check of its own.
"""

import os
import ssl
import sys
from collections.abc import Mapping
from http import HTTPStatus
from http.client import HTTPConnection, HTTPException, HTTPSConnection
from typing import Final

_TIMEOUT: Final = 4.5
"""Seconds. /readyz answers within 3 s, and a container's check has 5 s in all."""


def is_ready(prefix: str, environment: Mapping[str, str]) -> tuple[bool, str]:
    """Return whether the process is ready, and what it answered. Raises KeyError if the port is not set."""
    port = int(environment[f"{prefix}_METRICS_PORT"])
    connection = HTTPConnection("127.0.0.1", port, timeout=_TIMEOUT)
    if environment.get(f"{prefix}_METRICS_TLS_CERT"):
        # It does not leave the container, and the certificate is for another name.
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
        connection = HTTPSConnection("127.0.0.1", port, timeout=_TIMEOUT, context=context)
    try:
        connection.request("GET", "/readyz")
        answer = connection.getresponse()
        return answer.status == HTTPStatus.OK, answer.read().decode()
    except (OSError, HTTPException) as error:
        return False, str(error)
    finally:
        connection.close()


if __name__ == "__main__":
    ready, said = is_ready(sys.argv[1], os.environ)
    sys.stdout.write(f"{said}\n")
    sys.exit(not ready)
