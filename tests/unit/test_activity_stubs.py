"""The stubs by which workflows call activities are what the services implement."""

import inspect
import typing
from collections.abc import Callable
from typing import Any

import pytest
from temporalio import activity

from services.gateway.batches.activities import BatchActivities
from services.gateway.deletion.owned import OwnedDeletion
from services.gateway.deletion.steps import DeletionSteps
from services.gateway.files.removal import FileRemoval
from services.gateway.pipelines.steps import PipelineSteps
from services.gateway.pipelines.texts import PipelineTexts
from services.gateway.quotas.admission import OpenJobQuotas
from services.gateway.quotas.ended_jobs import LedgerActivities
from services.gateway.schedules.jobs import ScheduledJobs
from services.gateway.workflow_worker import LocalActivities
from services.gpu_worker.activity import RunLLMOnGPU
from services.gpu_worker.batch.activity import RunBatchChunk
from services.notifier.activity import NotifyUI
from services.notifier.progress import NotifyProgress
from workflows import activities

IMPLEMENTATIONS: dict[Callable[..., Any], Callable[..., Any]] = {
    activities.run_llm_on_gpu: RunLLMOnGPU.__call__,
    activities.run_batch_chunk: RunBatchChunk.__call__,
    activities.notify_ui: NotifyUI.__call__,
    activities.notify_progress: NotifyProgress.__call__,
    activities.request_cancel: LocalActivities.request_cancel,
    activities.recover_output: LocalActivities.recover_output,
    activities.forget_feed: LocalActivities.forget_feed,
    activities.find_ended_jobs: LedgerActivities.find_ended_jobs,
    activities.lease_tokens: OpenJobQuotas.lease,
    activities.delete_schedules: OwnedDeletion.delete_schedules,
    activities.delete_files: OwnedDeletion.delete_files,
    activities.stop_job: DeletionSteps.stop_job,
    activities.inspect_job: DeletionSteps.inspect_job,
    activities.keep_job_id: DeletionSteps.keep_job_id,
    activities.remove_job: DeletionSteps.remove_job,
    activities.find_jobs: DeletionSteps.find_jobs,
    activities.remove_file: FileRemoval.remove_file,
    activities.start_scheduled_job: ScheduledJobs.start,
    activities.check_scheduled_job: ScheduledJobs.check,
    activities.plan_batch: BatchActivities.plan_batch,
    activities.collect_chunks: BatchActivities.collect_chunks,
    activities.write_manifest: BatchActivities.write_manifest,
    activities.merge_batch: BatchActivities.merge_batch,
    activities.clean_batch: BatchActivities.clean_batch,
    activities.admit_step: PipelineSteps.admit_step,
    activities.admit_steps: PipelineSteps.admit_steps,
    activities.recall_step: PipelineSteps.recall_step,
    activities.left_usage: PipelineSteps.left_usage,
    activities.publish_pipeline: PipelineSteps.publish_pipeline,
    activities.admit_batch: PipelineSteps.admit_batch,
    activities.read_text: PipelineTexts.read_text,
    activities.write_text: PipelineTexts.write_text,
}


def name_of(function: Callable[..., Any]) -> str | None:
    return activity._Definition.must_from_callable(function).name


def signature_of(function: Callable[..., Any]) -> list[Any]:
    """Return the name, type and default of each argument, and the type of the result."""
    types = typing.get_type_hints(function)
    arguments = [one for one in inspect.signature(function).parameters.values() if one.name != "self"]
    return [*((one.name, types[one.name], one.default) for one in arguments), types["return"]]


def test_every_stub_has_an_implementation() -> None:
    stubs = [one for _, one in inspect.getmembers(activities, inspect.iscoroutinefunction)]
    assert set(stubs) == set(IMPLEMENTATIONS)


@pytest.mark.parametrize("stub", IMPLEMENTATIONS, ids=lambda stub: str(stub.__name__))
def test_a_stub_has_the_name_and_signature_of_its_implementation(stub: Callable[..., Any]) -> None:
    implementation = IMPLEMENTATIONS[stub]
    assert name_of(stub) == name_of(implementation)
    assert signature_of(stub) == signature_of(implementation)
