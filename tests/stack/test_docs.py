"""The documentation is correct: its commands run, its JSON parses, its tables are complete."""

import ast
import json
import os
import re
import shutil
import sys
from collections.abc import Iterator
from datetime import timedelta
from http import HTTPStatus
from pathlib import Path
from typing import Any

import pytest
import yaml
from google.protobuf import descriptor_pool, json_format, message_factory
from google.rpc import code_pb2
from temporalio.service import RPCError, RPCStatusCode

from deploy.local.stack import Stack
from deploy.record_kill import BEGIN, END, record, with_recording
from jobs.errors import RULES
from jobs.field_rules import Violation
from jobs.names import (
    MODEL_NOT_FOUND,
    MODEL_VERSION_IN_USE,
    STEP_ANSWERED,
    STEP_NOT_FOUND,
    STEP_NOT_WAITING,
    TOO_MANY_MODELS,
)
from llm_pb import internal_pb2
from payload_converter import PayloadError
from runtime import auth
from services.gateway import errors
from services.gateway.scopes import user_not_allowed
from services.gateway.settings import GatewaySettings
from services.notifier.event import to_event
from services.notifier.openai_event import to_openai_event
from tests.support.blocks import Block, anchors, blocks
from tests.support.commands import missing, run
from tests.support.jobs import unpack
from tests.support.paths import ROOT
from tests.support.scrapes import get


def pages() -> Iterator[Path]:
    """Yield the pages of the repository. Folders of installed packages, which are large, are not read."""
    for folder, folders, files in os.walk(ROOT):
        folders[:] = [name for name in folders if not name.startswith(".") and name != "node_modules"]
        yield from (Path(folder, name) for name in files if name.endswith(".md") and name != "CHANGELOG.md")


PAGES = sorted(pages())
"""Pages that describe the present state."""
PATH = r"`([\w.-]*\w(?:/[\w.*-]+)+/?|\w[\w.-]*/)`"
NOT_OURS = {
    "application/json",
    "application/problem+json",
    "binary/protobuf",
    "http/json",
    "http/protobuf",
    "json/plain",
    "json/protobuf",
    "parts/*/write",
    "text/plain",
}
"""Texts in pages that look like paths of the repository and are not."""


def of_language(*languages: str) -> pytest.MarkDecorator:
    # Code of pipelines runs in the gateways of the stack, and the runbook's commands where something is wrong: see
    # tests.stack.test_pipelines and test_runbook.
    elsewhere = [block for block in blocks() if block.of == "registered" or block.place.startswith("docs/runbook.md")]
    chosen = [block for block in blocks() if block.language in languages and block not in elsewhere]
    return pytest.mark.parametrize("block", chosen, ids=lambda block: block.place)


@of_language("sh", "python")
async def test_the_commands_work(block: Block, stack: Stack, tmp_path: Path) -> None:
    """They run unchanged, except for addresses, in the repository's root. `durable-llm` is on the PATH."""
    if re.search(r"^(node|npm) ", block.text, re.MULTILINE) and shutil.which("npm") is None:
        missing("npm")
    text = block.text.replace("127.0.0.1:50051", stack.address("gateway"))
    # The model of the tests that takes structured output has another name.
    text = text.replace('"write": "docstrings"', '"write": "structured"')
    text = text.replace("127.0.0.1:7233", stack.address("temporal"))
    text = text.replace("127.0.0.1:8080", stack.address("http"))
    command = (sys.executable, "-c") if block.language == "python" else ("bash", "-euo", "pipefail", "-c")
    script = tmp_path / "durable-llm"
    script.write_text(f'#!/bin/sh\nexec {sys.executable} -m durable_llm "$@"\n')
    script.chmod(0o700)
    environment = {
        "LLM_ADDRESS": stack.address("gateway"),
        "DURABLE_LLM_CONFIG": str(tmp_path / "config.toml"),
        "PATH": f"{tmp_path}:{Path(sys.executable).parent}:{os.environ['PATH']}",
    }
    ended = await run(*command, text, **environment)
    assert ended.status == 0, ended.errors
    assert ended.output


@of_language("json")
def test_the_json_is_what_it_says(block: Block) -> None:
    """A message's JSON has only known fields. An event is one that the notifier could create, in each of its forms."""
    value = json.loads(block.text)
    if block.of == "CloudEvent":
        links = value["data"].pop("links")
        request = json_format.ParseDict(value["data"], internal_pb2.NotifyRequest(notification_id=value["id"]))
        value["data"]["links"] = links
        job_url = links["job"].replace(value["subject"], "{workflow_id}")
        assert to_event(request, value["source"], job_url) == value
    elif block.of == "OpenAIEvent":
        (event,) = [json.loads(other.text) for other in blocks() if other.of == "CloudEvent"]
        assert to_openai_event(event) == value
    else:
        assert json_format.ParseDict(value, message(block.of)).ByteSize() > 0


def message(name: str) -> Any:
    return message_factory.GetMessageClass(descriptor_pool.Default().FindMessageTypeByName(name))()


@of_language("yaml")
async def test_a_probe_finds_what_it_asks_for(block: Block, stack: Stack) -> None:
    probes = [value["httpGet"] for key, value in yaml.safe_load(block.text).items() if key.endswith("Probe")]
    assert probes
    for probe in probes:
        assert probe["port"] == GatewaySettings().metrics_port
        await get(stack.metrics_url("gateway").replace("/metrics", probe["path"]))


def test_every_language_is_tested() -> None:
    """Every block is run or parsed above, except `trace`, for test_tracing, and `console`, which cannot run here.

    tests/unit/test_docs_commands.py looks up what its commands name.
    """
    assert {block.language for block in blocks()} <= {"sh", "python", "json", "yaml", "console", "trace"}


def test_the_table_of_job_errors_is_the_code() -> None:
    """It has one row for each error, with its code and whether it is retried."""
    rows = re.findall(r"^\| `(\w+)` \| `(\w+)` \| (yes|no) \|", errors_page(), re.MULTILINE)
    assert rows == [
        (error.reason, code_pb2.Code.Name(rule.code), "yes" if rule.retryable else "no")
        for error, rule in RULES.items()
    ]


def test_the_table_of_call_errors_is_the_code() -> None:
    """It has one row for each error that the gateway returns."""
    rows = re.findall(r"^\| `(\w+)` \| `(\w+)` \| (?!yes \||no \|)", errors_page(), re.MULTILINE)
    made = [
        errors.invalid([Violation("a", "b")]),
        errors.not_found("a"),
        errors.job_not_ended("a"),
        errors.key_reused("a", "b"),
        errors.work_deleted("job", "a", "b"),
        errors.deletion_not_found("a"),
        errors.schedule_not_found("a"),
        errors.batch_not_found("a"),
        errors.pipeline_not_found("a"),
        errors.pipeline_resumed(),
        *(errors.answer_refused(reason, "a") for reason in (STEP_NOT_FOUND, STEP_NOT_WAITING, STEP_ANSWERED)),
        *(
            errors.trained_model_refused(reason, "a")
            for reason in (MODEL_NOT_FOUND, MODEL_VERSION_IN_USE, TOO_MANY_MODELS)
        ),
        errors.audit_unavailable(),
        errors.exhausted("a"),
        errors.quota_exceeded("a", "b", "c", timedelta(seconds=1)),
        errors.shutting_down(),
        errors.unreadable(PayloadError("a")),
        errors.keys_unavailable(),
        errors.from_temporal(RPCError("a", RPCStatusCode.UNKNOWN, b"")),
        errors.refused(auth.credential_missing("a")),
        errors.refused(auth.credential_invalid("a")),
        errors.refused(auth.credential_expired()),
        errors.refused(auth.scope_missing("a")),
        errors.refused(auth.authentication_unavailable()),
        errors.refused(user_not_allowed("a")),
        errors.feed_unavailable(),
        errors.file_not_found("a"),
        errors.file_key_reused("a", "b"),
        errors.wrong_offset(1, 2),
        errors.upload_overtaken(1),
        errors.file_not_ready("a"),
        errors.files_disabled(),
        errors.store_unavailable(),
        errors.content_unreadable("a"),
    ]
    assert set(rows) == {
        (unpack(error.status)["ErrorInfo"].reason, code_pb2.Code.Name(error.status.code)) for error in made
    }


def test_the_table_of_the_fronts_reasons_is_the_code() -> None:
    """It has one row for each reason that the front itself gives with a status."""
    page = (ROOT / "docs" / "http.md").read_text()
    rows = re.findall(r"^\| `([A-Z_]+)` \| (\d+) \|", page, re.MULTILINE)
    assert len(rows) == len(set(rows))
    sources = sorted((ROOT / "services" / "http").rglob("*.py"))
    assert set(rows) == {made for source in sources for made in reasons_of(source)}


def reasons_of(source: Path) -> Iterator[tuple[str, str]]:
    """Yield reason and status of each Failure that a module makes with a reason of its own."""
    for node in ast.walk(ast.parse(source.read_text())):
        match node:
            case ast.Call(ast.Name("Failure"), [ast.Attribute(attr=name), _, ast.Constant(str(reason)), *_]):
                yield reason, str(HTTPStatus[name].value)
            case ast.Call(ast.Name("unavailable"), [_, ast.Constant(str(reason))]):
                yield reason, str(HTTPStatus.SERVICE_UNAVAILABLE.value)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_the_links_lead_somewhere(page: Path) -> None:
    """Every relative link of a page has a target, and its heading exists if it names one."""
    for target, anchor in re.findall(r"\]\((?!https?:)([^)#]*)(?:#([^)]+))?\)", page.read_text()):
        found = page.parent / target if target else page
        assert found.exists(), target
        assert not anchor or anchor in anchors(found), f"{target}#{anchor}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_the_paths_that_a_page_names_exist(page: Path) -> None:
    """A path in code exists in the repository's root or in the page's folder."""
    named = {path for path in re.findall(PATH, page.read_text()) if path not in NOT_OURS}
    assert not {path for path in named if not any([*ROOT.glob(path), *page.parent.glob(path)])}


def test_what_a_reader_sees_when_a_process_dies_is_tested() -> None:
    """Every row of the README's table names a test that exists."""
    table = (ROOT / "README.md").read_text().partition("## What dies, what you see")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| .+ \| \[`(\w+)`\]\((.+)\) \|$", table, re.MULTILINE)
    assert len(rows) == table.count("\n|") - 2
    for test, file in rows:
        assert f"def {test}(" in (ROOT / file).read_text(), test


@pytest.mark.long
async def test_the_recording_of_the_readme_can_be_made_again() -> None:
    """A new recording has the same events in the same order. Times and the model's text may differ."""
    shown = (ROOT / "README.md").read_text()
    assert with_recording(shown, shown.partition(BEGIN)[2].partition(END)[0].strip("\n") + "\n") == shown
    assert events_of((await record()).markdown()) == events_of(shown)


def events_of(recording: str) -> list[str]:
    """Return the first words of the events without attempts after the second: a busy machine may lose one more."""
    what = r"Submit|RUNNING, attempt [12]$|\$ kill -9|SUCCEEDED|The text"
    events = re.findall(rf"^ *[\d.]+ s  ({what})", recording, re.MULTILINE)
    return list(dict.fromkeys(events))


def errors_page() -> str:
    return (ROOT / "docs" / "errors.md").read_text()
