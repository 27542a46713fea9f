"""A workflow that uses betterproto classes in the sandbox. The fixture `betterproto` generates `llm_betterproto`.

The sandbox passes no module through on purpose, so the classes here are copies of those outside.
"""

from llm_betterproto.llm.v1 import JobRequest, JobResult  # type: ignore[import-not-found]
from temporalio import workflow


@workflow.defn(name="ConvertBetterproto")
class ConvertBetterproto:
    """Workflow that returns the prompt."""

    @workflow.run
    async def run(self, job: JobRequest) -> JobResult:
        """Return the prompt as the output."""
        return JobResult(output=job.prompt)
