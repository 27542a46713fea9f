"""What the documentation shows is what happens: its commands run, its JSON parses, its tables are complete."""

import json
import os
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from google.protobuf import json_format
from google.rpc import code_pb2, error_details_pb2
from temporalio.service import RPCError, RPCStatusCode

from deploy.local.stack import Stack
from jobs.errors import RULES
from jobs.field_rules import Violation
from llm_pb import internal_pb2, llm_pb2
from payload_converter import PayloadError
from services.gateway import errors
from services.gateway.settings import GatewaySettings
from services.notifier.event import to_event
from tests.support.blocks import Block, blocks
from tests.support.commands import missing, run
from tests.support.jobs import unpack
from tests.support.paths import ROOT
from tests.support.scrapes import get


def of_language(*languages: str) -> pytest.MarkDecorator:
    chosen = [block for block in blocks() if block.language in languages]
    return pytest.mark.parametrize("block", chosen, ids=lambda block: block.place)


@of_language("sh", "python")
async def test_the_commands_work(block: Block, stack: Stack) -> None:
    """As they stand, in the repository's root, but for the addresses."""
    if re.search(r"^(node|npm) ", block.text, re.MULTILINE) and shutil.which("npm") is None:
        missing("npm")
    text = block.text.replace("127.0.0.1:50051", stack.address("gateway"))
    text = text.replace("127.0.0.1:7233", stack.address("temporal"))
    command = (sys.executable, "-c") if block.language == "python" else ("bash", "-euo", "pipefail", "-c")
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    ended = await run(*command, text, LLM_ADDRESS=stack.address("gateway"), PATH=path)
    assert ended.status == 0, ended.errors
    assert ended.output


@of_language("json")
def test_the_json_is_what_it_says(block: Block) -> None:
    """A message's JSON holds known fields only; an event is one that the notifier would make."""
    value = json.loads(block.text)
    if block.of == "CloudEvent":
        links = value["data"].pop("links")
        request = json_format.ParseDict(value["data"], internal_pb2.NotifyRequest(notification_id=value["id"]))
        value["data"]["links"] = links
        job_url = links["job"].replace(value["subject"], "{workflow_id}")
        assert to_event(request, value["source"], job_url) == value
    else:
        assert json_format.ParseDict(value, message(block.of)).ByteSize() > 0


def message(name: str) -> Any:
    package, _, short = name.rpartition(".")
    return getattr({"llm.v1": llm_pb2, "google.rpc": error_details_pb2}[package], short)()


@of_language("yaml")
async def test_a_probe_finds_what_it_asks_for(block: Block, stack: Stack) -> None:
    probes = [value["httpGet"] for key, value in yaml.safe_load(block.text).items() if key.endswith("Probe")]
    assert probes
    for probe in probes:
        assert probe["port"] == GatewaySettings().metrics_port
        await get(stack.metrics_url("gateway").replace("/metrics", probe["path"]))


def test_every_language_is_tested() -> None:
    """`console` is for what cannot run here, `trace` is for test_tracing; everything else above is run or parsed."""
    assert {block.language for block in blocks()} <= {"sh", "python", "json", "yaml", "console", "trace"}


def test_the_table_of_job_errors_is_the_code() -> None:
    """One row for each, with its code and whether another attempt may help."""
    rows = re.findall(r"^\| `(\w+)` \| `(\w+)` \| (yes|no) \|", errors_page(), re.MULTILINE)
    assert rows == [
        (error.reason, code_pb2.Code.Name(rule.code), "yes" if rule.retryable else "no")
        for error, rule in RULES.items()
    ]


def test_the_table_of_call_errors_is_the_code() -> None:
    """One row for each error that the gateway makes."""
    rows = re.findall(r"^\| `(\w+)` \| `(\w+)` \| (?!yes \||no \|)", errors_page(), re.MULTILINE)
    made = [
        errors.invalid([Violation("a", "b")]),
        errors.not_found("a"),
        errors.job_not_ended("a"),
        errors.key_reused("a", "b"),
        errors.exhausted("a"),
        errors.shutting_down(),
        errors.unreadable(PayloadError("a")),
        errors.keys_unavailable(),
        errors.from_temporal(RPCError("a", RPCStatusCode.UNKNOWN, b"")),
    ]
    assert set(rows) == {
        (unpack(error.status)["ErrorInfo"].reason, code_pb2.Code.Name(error.status.code)) for error in made
    }


def test_the_links_lead_somewhere() -> None:
    """Every relative link of a page."""
    for page in (ROOT / "docs").glob("*.md"):
        for target in re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


def errors_page() -> str:
    return (ROOT / "docs" / "errors.md").read_text()
