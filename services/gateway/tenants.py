"""The settings of tenants."""

from typing import Final, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

MAX_OPEN_JOBS: Final = 5000
"""Maximum of max_open_jobs: the ids of the open jobs must fit into one payload of Temporal's, 255 bytes each."""


class TenantSettings(BaseModel):
    """The settings for one tenant."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    weight: float = Field(1, ge=0.1, le=100)
    """The tenant's share of the GPUs while others wait, relative to the shares of others. Its users share it."""
    requests_per_second: float | None = Field(None, ge=0.001, le=1_000_000)
    """The calls a second that each gateway serves the tenant on average. None: not limited."""
    request_burst: int | None = Field(None, ge=1, le=1_000_000)
    """The calls that each gateway serves the tenant at once. None: those of a second, at least one."""
    max_open_jobs: int | None = Field(None, ge=0, le=MAX_OPEN_JOBS)
    """The maximum number of the tenant's jobs whose outcome is not settled, at all gateways. None: not limited."""
    max_output_tokens_per_day: int | None = Field(None, ge=0, le=2**53)
    """The maximum number of output tokens that the tenant's jobs use on a day of UTC, at all gateways. None: not
    limited. With it at most MAX_OPEN_JOBS jobs are open."""

    max_files: int | None = Field(None, ge=0)
    """The maximum number of the tenant's files. None: not limited."""
    max_file_bytes: int | None = Field(None, ge=0)
    """The maximum size of all of the tenant's files together, in bytes. None: not limited."""

    @model_validator(mode="after")
    def _burst_has_a_rate(self) -> Self:
        if self.request_burst is not None and self.requests_per_second is None:
            raise ValueError("request_burst needs requests_per_second")
        return self
