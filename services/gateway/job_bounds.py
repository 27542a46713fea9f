"""The bounds of a job that the operator's settings set."""

from jobs.field_rules import Violation, too_large
from llm_pb import llm_pb2
from runtime.auth import Caller
from runtime.grpc_auth import current_caller
from services.gateway.models.catalogue import Models
from services.gateway.prompt_files import PromptFiles
from services.gateway.settings import GatewaySettings


class JobBounds:
    """Checks jobs against the operator's settings."""

    def __init__(self, models: Models, settings: GatewaySettings, prompt_files: PromptFiles | None) -> None:
        """`prompt_files` is None where no job has a prompt_file."""
        self._prompt_files = prompt_files
        self._models = models
        self._settings = settings

    async def check(self, request: llm_pb2.SubmitRequest, caller: Caller | None = None) -> list[Violation]:
        """Return the violations of the operator's settings. Raises ApiError like Models.check and PromptFiles.check.

        `caller` is who submits the job: by default who makes the call that is being handled.
        """
        job, settings = request.job, self._settings
        if job.ByteSize() > settings.max_job_bytes:
            # The other checks would take too long.
            return [Violation("job", too_large(job.ByteSize(), settings.max_job_bytes))]
        caller = caller or current_caller()
        violations = await self._models.check(job, caller.tenant)
        if 1 <= job.priority < settings.highest_priority:
            rule = f"must be {settings.highest_priority} (first) to 5 (last) here, or 0 for the default"
            violations.append(Violation("job.priority", rule))
        most = {
            "total": settings.max_total_timeout,
            "queue": settings.max_queue_timeout,
            "run": settings.max_run_timeout,
        }
        for name, limit in most.items():
            asked = getattr(job.timeouts, name)
            if asked.seconds + asked.nanos / 1e9 > limit.total_seconds():
                violations.append(Violation(f"job.timeouts.{name}", f"must be at most {limit}"))
        ttl = job.cache.ttl
        if job.HasField("cache") and ttl.seconds + ttl.nanos / 1e9 > settings.max_cache_ttl.total_seconds():
            bound = f"must be at most {settings.max_cache_ttl}" if settings.max_cache_ttl else "is switched off here"
            violations.append(Violation("job.cache.ttl", bound))
        if not violations and self._prompt_files is not None:
            violations = await self._prompt_files.check(caller, job)
        return violations
