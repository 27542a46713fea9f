"""The rates of the classes of jobs: Submits a second, for each gateway by a token bucket."""

from datetime import timedelta
from math import ceil

from jobs.classes import NAMES, label_of
from llm_pb import common_pb2
from runtime.token_bucket import TokenBucket
from services.gateway.class_settings import Classes
from services.gateway.errors import ApiError, exhausted
from services.gateway.metrics import GatewayMetrics


class ClassRates:
    """How often this gateway accepts jobs of a class."""

    def __init__(self, classes: Classes, metrics: GatewayMetrics) -> None:
        self._metrics = metrics
        self._buckets = {
            job_class: TokenBucket(rate, max(ceil(rate), 1))
            for job_class in NAMES
            if (rate := classes.of(job_class).rate) is not None
        }

    def take(self, job_class: "common_pb2.JobClass.ValueType") -> ApiError | None:
        """Count a Submit. Return the ApiError for one beyond the rate, which does not count; None within the rate."""
        bucket = self._buckets.get(job_class)
        if bucket is None or not (wait := bucket.take()):
            return None
        self._metrics.class_refusals.add(1, {"llm.job.class": label_of(job_class)})
        allowed = f"{bucket.per_second:g} a second, {bucket.burst} at once"
        name = common_pb2.JobClass.Name(job_class)
        message = f"this gateway accepts jobs of {name} at {allowed}; submit the job again in {wait:.3f} s"
        return exhausted(message, timedelta(seconds=wait), {"job_class": name})

    def put_back(self, job_class: "common_pb2.JobClass.ValueType") -> None:
        """Do not count a Submit that has started no job."""
        if (bucket := self._buckets.get(job_class)) is not None:
            bucket.put_back()
