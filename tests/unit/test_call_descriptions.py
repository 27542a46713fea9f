"""What the command line says of a call that has failed."""

import grpc
import pytest

from durable_llm.cli._exits import describe_call
from durable_llm.errors import TemporalUnavailable, Unavailable


@pytest.mark.parametrize(("kind", "asks"), [(Unavailable, True), (TemporalUnavailable, False)])
def test_who_has_got_the_gateways_answer_is_not_asked_whether_there_is_one(kind: type[Unavailable], asks: bool) -> None:
    said = describe_call(kind("it did not answer", grpc.StatusCode.UNAVAILABLE), "example:50051")
    assert said.startswith("it did not answer")
    assert ("Does a gateway listen at example:50051?" in said) == asks
