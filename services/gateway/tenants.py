"""What the gateway knows about tenants."""

from pydantic import BaseModel, ConfigDict, Field


class TenantSettings(BaseModel):
    """The settings for one tenant."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    weight: float = Field(1, ge=0.01, le=100)
    """The tenant's share of the GPUs while others wait, relative to the shares of others. Its users share it."""
