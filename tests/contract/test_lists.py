"""Every method, kind of target and engine is in each list that must contain it."""

import re
from typing import Any, get_args

import pytest

from deploy.local.settings import StackSettings
from jobs.rules import check_job
from jobs.targets import describe
from llm_pb import llm_pb2
from services.gateway.auditing import WRITES
from services.gateway.batches.servicer import BatchServicer
from services.gateway.files.servicer import FileServicer
from services.gateway.methods import SERVICES, VALIDATORS
from services.gateway.pipelines.servicer import PipelineServicer
from services.gateway.schedules.servicer import ScheduleServicer
from services.gateway.scopes import OF_METHOD
from services.gateway.servicer import LlmServicer
from services.gpu_worker.engines.engine import ENGINES, IMAGE_ENGINES
from services.gpu_worker.settings import GpuWorkerSettings
from tests.contract import test_engines, test_image_engines
from tests.support.bad_requests import PATHS
from tests.support.fuzz_calls import WEIGHTS
from tests.support.jobs import new_job
from tests.support.paths import ROOT
from tests.support.peers import PEERS

SERVICERS = (LlmServicer, FileServicer, BatchServicer, PipelineServicer, ScheduleServicer)
READS = ("Get", "List", "Stream", "Download")
"""Beginnings of the names of methods that change nothing."""
SECURITY = (ROOT / "docs/security.md").read_text()
TARGETS = [field.name for field in llm_pb2.NotifyTarget.DESCRIPTOR.oneofs_by_name["target"].fields]


@pytest.mark.parametrize("method", PATHS)
def test_a_method_is_served_checked_and_attacked(method: str) -> None:
    assert [servicer for servicer in SERVICERS if method in vars(servicer)], "no servicer has such a method"
    assert method in VALIDATORS, "its request has no validator"
    assert f"/{PATHS[method]}" in OF_METHOD, "it has no scope"
    assert PATHS[method] in WEIGHTS, "the fuzzer does not call it"
    assert (method in WRITES) != method.startswith(READS), "it joins WRITES if it changes something, READS here if not"


@pytest.mark.parametrize("method", PATHS)
def test_the_scope_of_a_method_is_documented(method: str) -> None:
    scope = OF_METHOD[f"/{PATHS[method]}"]
    (row,) = re.findall(rf"^\| `{scope}` \| (.*)$", SECURITY, re.MULTILINE)
    assert f"`{method}`" in row, f"docs/security.md does not name it in the row of {scope}"


def test_no_two_services_have_a_method_of_the_same_name() -> None:
    """The interceptor knows methods by their names alone."""
    assert len(PATHS) == sum(len(service.methods) for service in SERVICES.values())


@pytest.mark.parametrize("kind", TARGETS)
def test_a_kind_of_target_is_checked_shown_and_delivered_to(kind: str) -> None:
    (violation, *_) = check_job(new_job(notify=[target(kind, "")]))
    assert violation.field.startswith(f"notify[0].{kind}."), "jobs.rules accepts an empty one"
    assert describe(target(kind, "https://a.example/")), "jobs.targets does not show it"
    assert kind in PEERS, "the contract of sinks has no receiver for it"


@pytest.mark.parametrize("engine", ENGINES)
def test_an_engine_can_be_chosen_and_keeps_the_contract(engine: str) -> None:
    for settings in (GpuWorkerSettings, StackSettings):
        assert engine in get_args(settings.model_fields["engine"].annotation), settings.__name__
    # A provider keeps only a part of the contract, and a whole stack has to be one: tests/stack/test_openai_engine.py.
    assert engine in {*test_engines.OPTIONS, "openai"}, "the contract of engines does not test it"


@pytest.mark.parametrize("engine", IMAGE_ENGINES)
def test_an_image_engine_can_be_chosen_and_keeps_the_contract(engine: str) -> None:
    assert engine in get_args(GpuWorkerSettings.model_fields["engine"].annotation)
    assert engine in test_image_engines.OPTIONS, "the contract of image engines does not test it"


def target(kind: str, text: str) -> llm_pb2.NotifyTarget:
    """Return a target of a kind with its first string field set."""
    made: Any = llm_pb2.NotifyTarget()
    message = getattr(made, kind)
    message.SetInParent()
    setattr(message, next(field.name for field in message.DESCRIPTOR.fields if field.type == field.TYPE_STRING), text)
    return made
