"""OpenAI's client with an API key of this service: whose jobs its requests make and find."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Final

import httpx
import openai
import pytest
from openai import AsyncOpenAI

from deploy.local.stack import Stack
from jobs.response_ids import workflow_id_of
from runtime.scopes import SCOPES
from tests.stack.test_openai import MODEL, openai_client
from tests.support.credentials import KeyFile

ALL: Final = sorted(SCOPES)
PATIENCE: Final = 60


class Guarded:
    """A front before a gateway that asks who calls."""

    def __init__(self, folder: Path) -> None:
        self.keys = KeyFile(folder / "keys.json")
        self.acme = self.keys.add(ALL, tenant="acme")
        self.bound = self.keys.add(ALL, tenant="acme", user_id="bob")
        self.globex = self.keys.add(ALL, tenant="globex")
        self.reader = self.keys.add(["jobs:submit", "jobs:read", "jobs:cancel"], tenant="acme")
        self.address = ""


@pytest.fixture(scope="module")
async def guarded(stack: Stack, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Guarded]:
    guarded = Guarded(tmp_path_factory.mktemp("keys"))
    gateway = stack.add("gateway", {"GATEWAY_API_KEYS_FILE": str(guarded.keys.path)})
    await gateway.start()
    await gateway.wait_ready()
    front = stack.add("http", {"HTTP_GATEWAY": stack.address(gateway.name)})
    await front.start()
    await front.wait_ready()
    guarded.address = stack.address(front.name)
    yield guarded
    for process in (front, gateway):
        await process.terminate()


async def create(client: AsyncOpenAI, **more: str) -> str:
    """Return the id of the job of a new response."""
    response = await client.responses.create(
        model=MODEL, input="Go on.", max_output_tokens=3, background=True, extra_body=more
    )
    return workflow_id_of(response.id)


async def test_a_response_is_of_the_tenant_and_user_of_the_key(guarded: Guarded) -> None:
    async with (
        openai_client(guarded.address, guarded.acme) as acme,
        openai_client(guarded.address, guarded.bound) as bound,
    ):
        assert (await create(acme)).startswith("llmjob--acme-openai-")
        assert (await create(acme, user="alice")).startswith("llmjob--acme-alice-")
        # A key that is bound to a user is for this user, whom the client need not name.
        assert (await create(bound)).startswith("llmjob--acme-bob-")
        assert (await create(bound, user="bob")).startswith("llmjob--acme-bob-")
        with pytest.raises(openai.PermissionDeniedError, match="bob"):
            await create(bound, user="alice")


async def test_a_response_of_another_tenant_or_user_is_not_there(guarded: Guarded) -> None:
    async with (
        openai_client(guarded.address, guarded.acme) as acme,
        openai_client(guarded.address, guarded.globex) as globex,
        openai_client(guarded.address, guarded.bound) as bound,
    ):
        response = await acme.responses.create(model=MODEL, input="Go on.", max_output_tokens=3)
        for foreign in (globex, bound):
            for call in (
                foreign.responses.retrieve(response.id),
                foreign.responses.cancel(response.id),
                foreign.responses.input_items.list(response.id),
                foreign.responses.retrieve(response.id, stream=True),
                foreign.responses.delete(response.id),
            ):
                with pytest.raises(openai.NotFoundError):
                    await call
        assert (await acme.responses.retrieve(response.id)).id == response.id


async def test_a_credential_that_does_not_count_is_refused(guarded: Guarded) -> None:
    async with openai_client(guarded.address, "llmk_no_key") as nobody:
        with pytest.raises(openai.AuthenticationError):
            await nobody.models.list()
    async with openai_client(guarded.address, guarded.reader) as reader:
        with pytest.raises(openai.PermissionDeniedError, match="models:read"):
            await reader.models.list()
        # What could not be deleted is not begun.
        with pytest.raises(openai.PermissionDeniedError, match="jobs:delete"):
            await reader.responses.create(model=MODEL, input="Go on.", store=False)


@pytest.mark.parametrize("whose", ["acme", "bound"])
async def test_a_repeated_try_finds_the_job_of_its_own_caller(guarded: Guarded, whose: str) -> None:
    """The number of the try is what the client's own retry sends."""
    async with (
        openai_client(guarded.address, getattr(guarded, whose)) as client,
        openai_client(guarded.address, guarded.globex) as globex,
    ):

        async def send(client: AsyncOpenAI, number: int) -> str:
            response = await client.responses.create(
                model=MODEL,
                input=f"Repeated by {whose}.",
                max_output_tokens=3,
                background=True,
                extra_headers={"x-stainless-retry-count": str(number)},
            )
            return response.id

        first = await send(client, 0)
        second = await send(client, 0)
        assert first != second
        assert await send(client, 1) == first
        assert await send(client, 2) == first
        foreign = await send(globex, 1)
        assert foreign not in (first, second)
        # A job that was cancelled is what its client gave up.
        await client.responses.cancel(first)
        again = await send(client, 1)
        if (await client.responses.retrieve(first)).status == "cancelled":
            assert again not in (first, second)
        # Tries at once are one job, too.
        assert len(set(await asyncio.gather(*(send(globex, number) for number in (1, 2, 3))))) == 1


@pytest.mark.parametrize("count", ["\N{SUPERSCRIPT TWO}".encode("latin-1"), b"9" * 5000], ids=["no digit", "huge"])
async def test_a_number_of_the_try_that_is_none_counts_for_nothing(http: httpx.AsyncClient, count: bytes) -> None:
    body = {"model": MODEL, "input": "Go on.", "max_output_tokens": 3}
    headers = [(b"x-stainless-retry-count", count)]
    answers = [await http.post("/v1/responses", json=body, headers=headers) for _ in range(2)]
    assert [answer.status_code for answer in answers] == [200, 200]
    assert answers[0].json()["id"] != answers[1].json()["id"]
