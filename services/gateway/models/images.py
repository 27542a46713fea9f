"""The rules of jobs on models that make images, and of sizes of images on models that do not."""

from jobs.field_rules import Violation
from llm_pb import llm_pb2
from services.gateway.models.settings import Model


def check_image(job: llm_pb2.JobRequest, model: Model) -> list[Violation]:
    """Return what is wrong with a job for its model, as far as it is about images."""
    if not model.image_sizes:
        return [Violation("job.image_size", f"the model {model.name} makes no images")] * job.HasField("image_size")
    violations = []
    if job.HasField("image_size") and job.image_size not in model.image_messages():
        sizes = ", ".join(f"{size.width}x{size.height}" for size in model.image_sizes)
        violations.append(Violation("job.image_size", f"must be a size of the model {model.name}: {sizes}"))
    wrong = [f"params.{field.name}" for field, _ in job.params.ListFields() if field.name != "seed"]
    wrong += [
        name for name in ("messages", "prompt_file", "cache") if name in {field.name for field, _ in job.ListFields()}
    ]
    rule = f"is not supported by the model {model.name}, which makes images"
    return [*violations, *(Violation(f"job.{field}", rule) for field in wrong)]
