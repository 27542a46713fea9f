"""What Temporal's visibility lists: jobs, files, batches, pipelines and schedules are filtered and paged in one way."""

import asyncio
from collections.abc import Mapping, Sequence
from datetime import timedelta
from typing import Final, Protocol, TypeVar

from temporalio.common import SearchAttributeKey
from temporalio.service import RPCError, RPCStatusCode

from jobs import names
from jobs.ids import tenant_of
from jobs.search import HASHED, Hash
from services.gateway.errors import invalid, temporal_unavailable
from services.gateway.page_token import PageRequest, PageTokens

DEFAULT_PAGE_SIZE: Final = 20


class Listed(Protocol):
    """A workflow or schedule of a list."""

    @property
    def id(self) -> str:
        """Its id, which tells its tenant."""
        ...


_T = TypeVar("_T", bound=Listed)
_T_co = TypeVar("_T_co", bound=Listed, covariant=True)


class Pages(Protocol[_T_co]):
    """The pages of a list, as the SDK has them."""

    @property
    def current_page(self) -> Sequence[_T_co] | None:
        """The page that was fetched last."""
        ...

    @property
    def next_page_token(self) -> bytes | None:
        """Temporal's token of the page after it."""
        ...

    async def fetch_next_page(self) -> None:
        """Fetch a page. Raises RPCError."""
        ...


async def own_page(
    pages: Pages[_T], tenant: str, request: PageRequest, tokens: PageTokens, within: timedelta
) -> tuple[list[_T], str]:
    """Return what the first of the pages holds of a tenant, and the page_token of the page that follows.

    Raises ApiError INVALID_ARGUMENT for a page_token that Temporal refuses, UNAVAILABLE when
    it does not answer in time; RPCError.
    """
    try:
        async with asyncio.timeout(within.total_seconds()):
            await pages.fetch_next_page()
    except TimeoutError as error:
        raise temporal_unavailable("Temporal did not list the page in time; call again") from error
    except RPCError as error:
        # The token may be of an older Temporal: its SQL store answers UNKNOWN to a token that it cannot read.
        if request.page_token and error.status in (RPCStatusCode.INVALID_ARGUMENT, RPCStatusCode.UNKNOWN):
            raise invalid([tokens.refused]) from error
        raise
    # The id decides. What was started by hand may have any search attributes.
    own = [item for item in pages.current_page or () if tenant_of(item.id) == tenant]
    return own, tokens.seal(tenant, request, pages.next_page_token)


def terms_of(
    tenant: str, values: Mapping[SearchAttributeKey[str], str], hash_: Hash | None, *, knows_tenants: bool
) -> list[str]:
    """Return the terms of a query for what a tenant has with some values of search attributes. An empty one is none.

    Every value has passed a rule that forbids quotes. What is from before search attributes were hashed has them in
    clear, so a term asks for both forms. Where the namespace does not know tenants, or with none, the ids of what is
    found have to be looked at.
    """
    terms = []
    for key, value in {names.TENANT_ID: tenant, **values}.items():
        if value and hash_ is not None and key.name in HASHED:
            terms.append(f"{key.name} IN ('{value}', '{hash_(key.name, value)}')")
        elif value:
            terms.append(f"{key.name} = '{value}'")
    if not tenant and knows_tenants:
        # Others would be dropped from the page.
        terms.append(f"{names.TENANT_ID.name} IS NULL")
    return terms
