"""The classes of jobs: who waits for whom at the GPU."""

from collections.abc import Mapping
from typing import Final

from llm_pb import common_pb2, llm_pb2

BACKGROUND_QUEUE_SUFFIX: Final = ".background"
"""Appended to a model's task queue: the queue of its background jobs."""

NAMES: Final[Mapping["common_pb2.JobClass.ValueType", str]] = {
    common_pb2.JOB_CLASS_HIGH: "HIGH",
    common_pb2.JOB_CLASS_STANDARD: "STANDARD",
    common_pb2.JOB_CLASS_BACKGROUND: "BACKGROUND",
    common_pb2.JOB_CLASS_SCHEDULED: "SCHEDULED",
}
"""The classes, the most urgent one first, by the names that settings, fairness keys and messages have for them."""

_BACKGROUND: Final = frozenset({common_pb2.JOB_CLASS_BACKGROUND, common_pb2.JOB_CLASS_SCHEDULED})


def class_of(job: llm_pb2.JobRequest) -> "common_pb2.JobClass.ValueType":
    """Return the job's class, which is JOB_CLASS_STANDARD for a job that names none."""
    return job.job_class or common_pb2.JOB_CLASS_STANDARD


def is_background(job_class: "common_pb2.JobClass.ValueType") -> bool:
    """Return whether jobs of the class give their seats to others."""
    return job_class in _BACKGROUND


def queue_of(queue: str, job_class: "common_pb2.JobClass.ValueType") -> str:
    """Return the task queue for jobs of a class, given the task queue of their model."""
    return queue + BACKGROUND_QUEUE_SUFFIX if is_background(job_class) else queue


def label_of(job_class: "common_pb2.JobClass.ValueType") -> str:
    """Return the value of a metric's label for the class: "high", for example."""
    return NAMES.get(job_class, "other").lower()
