"""The reports of GPU workers about themselves, which travel through the connection of the live feed.

They are never encrypted: a WorkerReport holds nothing of any job.
"""

from collections.abc import Callable
from typing import Final, Protocol

from llm_pb import internal_pb2

MAX_REPORT_BYTES: Final = 2048
"""Maximum size of a serialized WorkerReport. Gateways ignore a larger one, so that they hold little for each worker."""

ReportHandler = Callable[[bytes], None]
"""Takes a serialized WorkerReport, or whatever else somebody has published on its subject. Never raises."""


class WorkerReports(Protocol):
    """The way from the workers to all gateways. Reports may be lost: the next one follows."""

    @property
    def receiving(self) -> bool:
        """Whether reports arrive now, as far as is known."""
        ...

    async def publish_report(self, report: internal_pb2.WorkerReport) -> bool:
        """Publish a report; return whether it was sent. Never raises, never blocks."""
        ...

    async def receive_reports(self, on_report: ReportHandler) -> None:
        """Call `on_report` with each report from now on, also after the connection was lost. May be called once."""
        ...
