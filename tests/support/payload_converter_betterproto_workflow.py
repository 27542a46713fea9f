"""A workflow that works with betterproto classes in the sandbox. The fixture `betterproto` generates `llm_betterproto`.

Nothing is passed through on purpose, so the classes here are copies of those outside.
"""

from llm_betterproto.llm.v1 import JobRequest, JobResult  # type: ignore[import-not-found]
from temporalio import workflow


@workflow.defn(name="ConvertBetterproto")
class ConvertBetterproto:
    """Answers with the prompt."""

    @workflow.run
    async def run(self, job: JobRequest) -> JobResult:
        """Return the prompt as the output."""
        return JobResult(output=job.prompt)
