"""Schedules by the Python client and by the command durable-llm."""

import asyncio
import json
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from deploy.local.stack import Stack
from durable_llm import AsyncClient, Client
from durable_llm.cli._exits import Exit
from durable_llm.errors import ApiError
from tests.stack.test_command_line import Cli
from tests.support.schedules import ended, new_schedule


@pytest.fixture
def cli(tmp_path: Path, stack: Stack) -> Cli:
    return Cli(tmp_path, stack.address("gateway"))


async def test_the_command_creates_and_manages_schedules(cli: Cli, stack: Stack) -> None:
    made = await cli("schedules", "create", "nightly", "Hello", "--every", "1h", "--max-tokens", "2", "--paused")
    assert (made.status, made.errors) == (0, "")
    id_ = made.output.strip()
    assert id_ == "llmschedule-cli-nightly"
    assert (await cli("schedules", "trigger", id_)).status == 0
    async with AsyncClient(stack.address("gateway")) as client:
        async with asyncio.timeout(120):
            while not ended((await client.schedules.get(id_)).status):  # noqa: ASYNC110
                await asyncio.sleep(0.1)
    shown = (await cli("schedules", "get", id_)).output
    for text in ("paused", "every 1:00:00", "skip", "docstrings", "SUCCEEDED", "llmjob-cli-nightly-"):
        assert text in shown
    assert (await cli("schedules", "unpause", id_, "--note", "go")).status == 0
    assert (await cli("schedules", "pause", id_, "--note", "stop")).status == 0
    end = datetime.now(UTC).replace(minute=0, second=0, microsecond=0) - timedelta(hours=1)
    form = "%Y-%m-%dT%H:%MZ"
    filled = await cli("schedules", "backfill", id_, (end - timedelta(hours=1)).strftime(form), end.strftime(form))
    assert filled.output == f"{id_} 2 times\n"
    found = json.loads((await cli("schedules", "get", id_, "--json")).output)
    assert found["status"]["note"] == "stop"
    assert (await cli("schedules", "ls", "--user", "nobody")).status == 0
    assert (await cli("schedules", "rm", id_)).output == f"{id_} deleted\n"
    gone = await cli("schedules", "get", id_)
    assert gone.status == Exit.NOT_FOUND
    assert gone.errors == f"durable-llm: there is no schedule {id_}\n"
    bad = await cli("schedules", "create", "never", "Hello", "--cron", "0 0 30 2 *", "--max-tokens", "0")
    assert bad.status == Exit.USAGE
    assert "schedule.times.cron[0] never matches" in bad.errors
    assert "job.params.max_tokens (--max-tokens)" in bad.errors


def test_the_client_without_asyncio_has_the_same_calls(stack: Stack) -> None:
    schedule = new_schedule()
    with Client(stack.address("gateway")) as client:
        status = client.schedules.create(schedule, paused=True)
        assert client.schedules.get(status.schedule_id).schedule == schedule
        schedule.job.prompt = "Another."
        client.schedules.update(status.schedule_id, schedule)
        assert client.schedules.get(status.schedule_id).schedule == schedule
        client.schedules.delete(status.schedule_id)
        with pytest.raises(ApiError) as error:
            client.schedules.get(status.schedule_id)
        assert error.value.reason == "SCHEDULE_NOT_FOUND"
