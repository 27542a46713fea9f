"""The rules of JobRequest.cache."""

from collections.abc import Iterator
from typing import Final

from jobs.field_rules import Violation, check_bounded_duration
from llm_pb import llm_pb2

MAX_TTL_SECONDS: Final = 30 * 24 * 60 * 60


def check_cache(job: llm_pb2.JobRequest, path: str) -> Iterator[Violation]:
    """Check how a job uses the cache of answers."""
    if not job.HasField("cache"):
        return
    yield from check_bounded_duration(f"{path}cache.ttl", job.cache.ttl, 1, MAX_TTL_SECONDS)
    params = job.params
    if not (params.HasField("seed") or (params.HasField("temperature") and params.temperature == 0)):
        rule = "needs params.temperature 0 or params.seed: another answer would be drawn each time"
        yield Violation(f"{path}cache", rule)
