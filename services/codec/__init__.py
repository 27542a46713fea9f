"""The codec server: shows the suite's payloads in Temporal's Web UI and CLI. What it does is in payload_converter."""
