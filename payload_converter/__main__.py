"""Runs the codec server: `python -m payload_converter`. Settings: see payload_converter.settings."""

import asyncio
import logging

from payload_converter.codec_server import serve
from payload_converter.settings import CodecSettings


def main() -> None:
    """Serve until told to stop; a wrong setting or a taken port ends with an error."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s %(message)s")
    asyncio.run(serve(CodecSettings()))


if __name__ == "__main__":
    main()
