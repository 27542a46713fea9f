"""The models that the input of a pipeline names."""

from llm_pb import pipeline_pb2
from services.gateway.models.settings import ImageSize, Model
from services.gateway.pipelines.spec_models import check_models

TEXT = Model(name="small", context_tokens=9, max_output_tokens=9, default_max_tokens=9, structured_output=True)
SIZES = (ImageSize(width=64, height=64),)
IMAGES = Model(name="painter", context_tokens=9, max_output_tokens=9, default_max_tokens=9, image_sizes=SIZES)


def problems(*models: Model) -> dict[str, str]:
    spec = pipeline_pb2.WorldSpec(theme="fog", models={"describe": "nobody"}, image_model="nothing")
    return {each.field: each.description for each in check_models(pipeline_pb2.PipelineRequest(world=spec), models)}


def test_an_unknown_model_is_answered_with_those_that_make_the_same() -> None:
    text, images = 'pipeline.world.models["describe"]', "pipeline.world.image_model"
    assert problems(TEXT, IMAGES) == {
        text: "is not served here; choose one of: small",
        images: "is not served here; choose one of: painter",
    }
    assert problems(TEXT)[images] == "is not served here; no model here makes images"
    assert problems(IMAGES)[text] == "is not served here; no model here makes texts"
