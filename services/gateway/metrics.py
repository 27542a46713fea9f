"""The metrics of a gateway's API: accepted jobs, watchers, and the lag of their feed."""

from collections.abc import Callable, Mapping
from typing import Final

from opentelemetry.metrics import Meter, Observation

from jobs.classes import NAMES, label_of
from runtime.metrics import SHORT_SECONDS
from services.gateway.tenants import TenantSettings

_QUOTAS: Final = {
    "requests_per_second",
    "max_open_jobs",
    "max_output_tokens_per_day",
    "max_files",
    "max_file_bytes",
}
"""Fields of TenantSettings that refuse calls."""


class GatewayMetrics:
    """The instruments of one gateway."""

    def __init__(self, meter: Meter, tenants: Mapping[str, TenantSettings]) -> None:
        """`tenants` are those whose quotas the gateway keeps."""
        self.submitted = meter.create_counter(
            "llm.job.submitted", unit="{job}", description="Jobs that Submit started, without repeats of a Submit."
        )
        self.watchers = meter.create_up_down_counter(
            "llm.gateway.watchers", unit="{call}", description="Number of open StreamStatus calls."
        )
        self.watches = meter.create_up_down_counter(
            "llm.gateway.watches", unit="{job}", description="Number of watched jobs."
        )
        self.feed_lag = meter.create_histogram(
            "llm.gateway.feed.lag",
            unit="s",
            description="Time from a worker's progress report to its arrival at the gateway, for watched jobs.",
            explicit_bucket_boundaries_advisory=SHORT_SECONDS,
        )
        self.audit_lost = meter.create_counter(
            "llm.audit.lost", unit="{record}", description="Audit records that could not be stored."
        )
        self.audit_lost.add(0)
        self.ignored_reports = meter.create_counter(
            "llm.gateway.worker.reports.ignored",
            unit="{report}",
            description="Reports of GPU workers that are invalid, or of more workers than a gateway keeps.",
        )
        self.ignored_reports.add(0)
        self._quota_refusals = meter.create_counter(
            "llm.gateway.quota.refusals",
            unit="{call}",
            description="Calls that a quota of their tenant refused, by tenant and by the name of the quota.",
        )
        self.class_refusals = meter.create_counter(
            "llm.gateway.class.refusals",
            unit="{call}",
            description="Submits beyond the rate of their job's class, by the class.",
        )
        self.batch_items = meter.create_counter(
            "llm.batch.items",
            unit="{item}",
            description="Items of batches that have ended, of those that are jobs of their own.",
        )
        # The metrics exist before the first watcher or refusal comes.
        for job_class in NAMES:
            self.class_refusals.add(0, {"llm.job.class": label_of(job_class)})
        for tenant, quotas in tenants.items():
            for quota in _QUOTAS.intersection(quotas.model_dump(exclude_none=True)):
                self._quota_refusals.add(0, {"llm.tenant": tenant, "llm.quota": quota})
        self.watchers.add(0)
        self.watches.add(0)

    def count_quota_refusal(self, tenant: str, quota: str) -> None:
        """Count a call that a quota of a tenant has refused. Only tenants of the settings have quotas."""
        self._quota_refusals.add(1, {"llm.tenant": tenant, "llm.quota": quota})

    def observe_unread(self, meter: Meter, held_bytes: Callable[[], int]) -> None:
        """Measure the memory that calls hold until their answers are read."""
        meter.create_observable_gauge(
            "llm.gateway.unread",
            [lambda _: [Observation(held_bytes())]],
            unit="By",
            description="Memory that calls hold until their clients have read the answers.",
        )
