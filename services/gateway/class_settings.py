"""The settings of the classes of jobs."""

from datetime import timedelta

from pydantic import BaseModel, ConfigDict, Field

from jobs.classes import NAMES
from jobs.options import DEFAULT_BACKGROUND_QUEUE_TIMEOUT, DEFAULT_BACKGROUND_TOTAL_TIMEOUT
from llm_pb import common_pb2


class ClassSettings(BaseModel):
    """The settings of one class."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    weight: float = Field(50, ge=0.1, le=1000)
    """The class's turns, relative to those of others. The turns of a tenant or user in it are in proportion."""
    rate: float | None = Field(None, ge=0.001, le=1_000_000)
    """The Submits a second that each gateway accepts. None: not limited."""
    queue_timeout: timedelta | None = Field(None, gt=timedelta(0))
    """Default of JobTimeouts.queue. None: that of all classes."""
    total_timeout: timedelta | None = Field(None, gt=timedelta(0))
    """Default of JobTimeouts.total. None: that of all classes."""


class _High(ClassSettings):
    weight: float = Field(100, ge=0.1, le=1000)
    rate: float | None = Field(100, ge=0.001, le=1_000_000)


class _Background(ClassSettings):
    weight: float = Field(10, ge=0.1, le=1000)
    rate: float | None = Field(10, ge=0.001, le=1_000_000)
    queue_timeout: timedelta | None = Field(DEFAULT_BACKGROUND_QUEUE_TIMEOUT, gt=timedelta(0))
    total_timeout: timedelta | None = Field(DEFAULT_BACKGROUND_TOTAL_TIMEOUT, gt=timedelta(0))


class _Scheduled(_Background):
    weight: float = Field(5, ge=0.1, le=1000)
    rate: float | None = Field(None, ge=0.001, le=1_000_000)


class Classes(BaseModel):
    """The settings of all classes. A class, or a field of one, that is left out has its default."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    # STANDARD has no rate by default: jobs that name no class were accepted at any rate before there were classes.
    HIGH: _High = Field(default_factory=_High)
    STANDARD: ClassSettings = Field(default_factory=ClassSettings)
    BACKGROUND: _Background = Field(default_factory=_Background)
    SCHEDULED: _Scheduled = Field(default_factory=_Scheduled)

    def of(self, job_class: "common_pb2.JobClass.ValueType") -> ClassSettings:
        """Return the settings of a class."""
        settings: ClassSettings = getattr(self, NAMES[job_class])
        return settings

    def turns(self, job_class: "common_pb2.JobClass.ValueType") -> float:
        """Return the weight of a class in proportion to that of JOB_CLASS_STANDARD, which is 1."""
        return self.of(job_class).weight / self.STANDARD.weight
