"""The input of a registered pipeline."""

import pytest
from google.protobuf.any_pb2 import Any as AnyMessage
from google.protobuf.struct_pb2 import Struct

from jobs.parsing import InvalidFields, parse
from llm_pb import pipeline_pb2
from pipelines.registry import Registered
from services.gateway.pipelines.catalogue import check_registered


async def _code(*_: object) -> Struct:
    return Struct()


@pytest.fixture(autouse=True)
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    found = Registered("deep", Struct, Struct, _code, resumes=False)
    monkeypatch.setattr("services.gateway.pipelines.catalogue.REGISTERED", {"deep": found})


def request(value: AnyMessage) -> pipeline_pb2.PipelineRequest:
    return pipeline_pb2.PipelineRequest(custom=pipeline_pb2.CustomSpec(name="deep", input=value))


@pytest.mark.parametrize("objects", [33, 34])
def test_an_input_that_is_too_deep_is_told_how_deep_one_may_be(objects: int) -> None:
    """It had to be a Struct, and was one."""
    whole = Struct()
    inner = whole
    for _ in range(objects - 1):
        inner = inner.fields["in"].struct_value
    inner.fields["last"].bool_value = True
    value = AnyMessage()
    value.Pack(whole)
    wrong = [field for field, rule in check_registered(request(value)) if "which are 33 objects" in rule]
    assert wrong == ["pipeline.custom.input"] * (objects - 33)


def test_an_input_of_another_type_is_told_which_one_it_must_be() -> None:
    value = AnyMessage()
    value.Pack(pipeline_pb2.CustomSpec())
    assert check_registered(request(value)) == [("pipeline.custom.input", "must be a google.protobuf.Struct")]


@pytest.mark.parametrize("objects", [49, 60])
def test_json_that_is_too_deep_is_told_how_deep_it_may_be(objects: int) -> None:
    """It was no message of llm.proto, without a reason."""
    value: dict[str, object] = {"last": True}
    for _ in range(objects - 1):
        value = {"in": value}
    whole = {"@type": "type.googleapis.com/google.protobuf.Struct", "value": value}
    with pytest.raises(InvalidFields, match="which are 33 objects of a Struct"):
        parse({"custom": {"name": "deep", "input": whole}}, pipeline_pb2.PipelineRequest())
