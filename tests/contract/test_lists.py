"""What the contract names joins several lists. One that was forgotten in a list is found here, and nowhere so soon."""

from typing import Any, get_args

import pytest

from deploy.local.settings import StackSettings
from jobs.rules import check_job
from jobs.targets import describe
from llm_pb import llm_pb2
from services.gateway.interceptor import VALIDATORS
from services.gateway.servicer import LlmServicer
from services.gpu_worker.engines.engine import ENGINES
from services.gpu_worker.settings import GpuWorkerSettings
from tests.contract import test_engines
from tests.support.bad_requests import REQUESTS
from tests.support.fuzz_calls import SERVICE, WEIGHTS
from tests.support.jobs import new_job
from tests.support.peers import PEERS

METHODS = llm_pb2.DESCRIPTOR.services_by_name["LlmService"].methods_by_name
TARGETS = [field.name for field in llm_pb2.NotifyTarget.DESCRIPTOR.oneofs_by_name["target"].fields]


@pytest.mark.parametrize("method", METHODS)
def test_a_method_is_served_checked_and_attacked(method: str) -> None:
    assert method in vars(LlmServicer), "no method of LlmServicer"
    assert method in VALIDATORS, "no rule for its request"
    assert method in REQUESTS, "not tried with bad requests"
    assert f"{SERVICE}/{method}" in WEIGHTS, "not called by the fuzzer"


@pytest.mark.parametrize("kind", TARGETS)
def test_a_kind_of_target_is_checked_shown_and_delivered_to(kind: str) -> None:
    (violation, *_) = check_job(new_job(notify=[target(kind, "")]))
    assert violation.field.startswith(f"notify[0].{kind}."), "an empty one passes jobs.rules"
    assert describe(target(kind, "https://a.example/")), "jobs.targets does not show it"
    assert kind in PEERS, "no receiver for the contract of sinks"


@pytest.mark.parametrize("engine", ENGINES)
def test_an_engine_can_be_chosen_and_keeps_the_contract(engine: str) -> None:
    for settings in (GpuWorkerSettings, StackSettings):
        assert engine in get_args(settings.model_fields["engine"].annotation), settings.__name__
    assert engine in test_engines.OPTIONS, "not in the contract of engines"


def target(kind: str, text: str) -> llm_pb2.NotifyTarget:
    """Return a target of a kind, the first text of which is set."""
    made: Any = llm_pb2.NotifyTarget()
    message = getattr(made, kind)
    message.SetInParent()
    setattr(message, next(field.name for field in message.DESCRIPTOR.fields if field.type == field.TYPE_STRING), text)
    return made
