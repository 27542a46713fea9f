"""The pipelines `training` and `preprocess`: validate, tokenize, train, evaluate, register if better, always clean up.

Trainers run the steps. What they have made is in the store: between the steps go names of objects alone.
"""

from datetime import timedelta
from typing import Any, Final

from temporalio import workflow
from temporalio.common import RetryPolicy

with workflow.unsafe.imports_passed_through():
    from jobs import names
    from llm_pb import internal_pb2, pipeline_pb2
    from pipelines.errors import StepFailed

from pipelines.program import Pipeline
from pipelines.registry import pipeline

TRAINING: Final = "training"
PREPROCESS: Final = "preprocess"
TRAIN: Final = "train"
"""The step that trains."""
_VALIDATE: Final = timedelta(minutes=5)
_TRAIN: Final = timedelta(hours=24)
_OTHERS: Final = timedelta(hours=1)
_CLEAN: Final = timedelta(minutes=10)
"""Maximum time to clean up, the wait for a trainer included. Trainers remove later what is left."""
_TRAIN_RETRIES: Final = RetryPolicy(
    initial_interval=timedelta(seconds=1), maximum_interval=timedelta(seconds=60), maximum_attempts=1000
)
"""Retries of "train", each of which goes on at the last checkpoint, and of "register". What another attempt cannot mend
is not tried again."""


@pipeline(TRAINING, pipeline_pb2.TrainingSpec, pipeline_pb2.TrainingResult)
async def training(llm: Pipeline, spec: pipeline_pb2.TrainingSpec) -> pipeline_pb2.TrainingResult:
    """See TrainingSpec."""
    task = _task(spec)
    dataset = await _prepare(llm, task)
    llm.compensate(_clean, llm, task, True)
    beats = {"heartbeat_timeout": task.report.heartbeat_timeout.ToTimedelta()}
    trained = await llm.step(
        TRAIN,
        names.ACTIVITY_TRAIN_MODEL,
        task,
        task_queue=names.TRAINING_RUNS_QUEUE,
        result_type=internal_pb2.TrainingCheckpoint,
        start_to_close_timeout=_TRAIN,
        retry_policy=_TRAIN_RETRIES,
        **beats,
    )
    task.trained.CopyFrom(trained)
    llm.note(TRAIN, {"steps": trained.step, "tokens": trained.tokens, "loss": round(trained.loss, 4)})
    evaluated = await _step(
        llm, "evaluate", names.ACTIVITY_EVALUATE_MODEL, task, internal_pb2.ModelEvaluation, _OTHERS, **beats
    )
    task.evaluation.CopyFrom(evaluated)
    llm.note("evaluate", {"loss": round(evaluated.loss, 4), "base_loss": round(evaluated.base_loss, 4)})
    result = pipeline_pb2.TrainingResult(
        loss=evaluated.loss,
        base_loss=evaluated.base_loss,
        steps=trained.step,
        tokens=trained.tokens,
        dataset=dataset,
    )
    if evaluated.files:
        kind = internal_pb2.RegisterModelResponse
        # No gateway that runs workflows, for a minute, must not cost the model.
        registered = await _step(
            llm, "register", names.ACTIVITY_REGISTER_MODEL, task, kind, _OTHERS, retry_policy=_TRAIN_RETRIES
        )
        result.version, result.sha256 = registered.version, evaluated.sha256
        result.model = f"{spec.model}@{registered.version}"
        llm.note("register", {"model": result.model})
    try:
        await _clean(llm, task, False)
    except StepFailed:
        # Trainers remove what is left later. The model is there.
        workflow.logger.warning("a training could not be cleaned up")
    return result


@pipeline(PREPROCESS, pipeline_pb2.PreprocessSpec, pipeline_pb2.PreprocessResult)
async def preprocess(llm: Pipeline, spec: pipeline_pb2.PreprocessSpec) -> pipeline_pb2.PreprocessResult:
    """See PreprocessSpec."""
    same = pipeline_pb2.TrainingSpec(base_model=spec.base_model, dataset=spec.dataset)
    if spec.HasField("held_out"):
        same.held_out.CopyFrom(spec.held_out)
    return await _prepare(llm, _task(same))


def _task(spec: pipeline_pb2.TrainingSpec) -> internal_pb2.TrainingTask:
    info = workflow.info()
    return internal_pb2.TrainingTask(spec=spec, run=info.first_execution_run_id, workflow_queue=info.task_queue)


async def _prepare(llm: Pipeline, task: internal_pb2.TrainingTask) -> pipeline_pb2.PreprocessResult:
    """Validate and tokenize the data set; the results are in the task then."""
    report = await _step(llm, "validate", names.ACTIVITY_VALIDATE_DATASET, task, internal_pb2.DatasetReport, _VALIDATE)
    task.report.CopyFrom(report)
    beats = {"heartbeat_timeout": task.report.heartbeat_timeout.ToTimedelta()}
    kind = internal_pb2.TokenizedDataset
    dataset = await _step(llm, "preprocess", names.ACTIVITY_TOKENIZE_DATASET, task, kind, _OTHERS, **beats)
    task.dataset.CopyFrom(dataset)
    summary: pipeline_pb2.PreprocessResult = task.dataset.summary
    llm.note("preprocess", {"documents": summary.documents, "tokens": summary.tokens, "reused": summary.reused})
    return summary


async def _clean(llm: Pipeline, task: internal_pb2.TrainingTask, keep_last: bool) -> None:
    """Remove the checkpoints; the last one of a training that did not succeed stays for a while."""
    task.keep_last = keep_last
    kind = internal_pb2.CleanedTraining
    cleaned = await _step(llm, "clean", names.ACTIVITY_CLEAN_TRAINING, task, kind, _CLEAN, timeout=_CLEAN)
    if cleaned.kept_step:
        llm.note("clean", {"stopped_at_step": cleaned.kept_step, "kept_until": cleaned.expire_time.ToJsonString()})


async def _step(
    llm: Pipeline,
    name: str,
    activity: str,
    task: internal_pb2.TrainingTask,
    result: type[Any],
    within: timedelta,
    **more: Any,
) -> Any:
    """Run a step whose attempts may take so long. The wait for a trainer does not count."""
    return await llm.step(
        name,
        activity,
        task,
        task_queue=names.TRAINING_QUEUE,
        result_type=result,
        start_to_close_timeout=within,
        **more,
    )
