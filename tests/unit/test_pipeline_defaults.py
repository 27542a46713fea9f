"""The operator's defaults of a pipeline: what a request leaves out."""

from jobs.pipelines import with_defaults
from llm_pb import pipeline_pb2


def test_what_the_request_sets_replaces_the_default_as_a_whole_in_maps_key_by_key() -> None:
    """A list was appended to that of the defaults, and a file had the hash of another one."""
    defaults, request = pipeline_pb2.PipelineRequest(), pipeline_pb2.PipelineRequest(user_id="ann")
    defaults.training.lora_rank, defaults.training.lora_modules[:] = 8, ["q_proj"]
    defaults.training.dataset.file_id, defaults.training.dataset.sha256 = "file-1", b"1" * 32
    request.training.lora_modules.append("v_proj")
    request.training.dataset.file_id = "file-2"
    whole = with_defaults(request, defaults)
    assert (whole.user_id, whole.training.lora_rank, [*whole.training.lora_modules]) == ("ann", 8, ["v_proj"])
    assert whole.training.dataset == request.training.dataset
    defaults.world.models.update(describe="llama", write="llama")
    request.world.models["write"] = "mistral"
    assert with_defaults(request, defaults).world.models == {"describe": "llama", "write": "mistral"}


def test_defaults_of_another_pipeline_are_none() -> None:
    defaults, request = pipeline_pb2.PipelineRequest(), pipeline_pb2.PipelineRequest()
    defaults.world.theme = "rain"
    request.refine.topic = "snow"
    assert with_defaults(request, defaults) == with_defaults(request, None) == request
