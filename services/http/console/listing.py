"""A page of a list: the filters and the place that its URL has."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final
from urllib.parse import urlencode

from starlette.requests import Request

from services.http.bodies import query_of

PAGE_SIZE: Final = 25


@dataclass(frozen=True)
class ListQuery:
    """What a URL asks for."""

    filters: Mapping[str, str]
    """The filters by name. Those that are not set are empty."""
    page_token: str

    @classmethod
    def of(cls, request: Request, names: Sequence[str]) -> "ListQuery":
        """Return what a request asks for. Raises Failure, 400, for other parameters than `names`."""
        query = {name: values[0] for name, values in query_of(request, (*names, "page_token")).items()}
        return cls({name: query.get(name, "").strip() for name in names}, query.get("page_token", ""))

    @property
    def plain(self) -> bool:
        """Whether this is the first page without a filter."""
        return not (self.page_token or any(self.filters.values()))

    def shown(self, next_page_token: str) -> dict[str, Any]:
        """Return what the templates know of the list, by the token of the page that follows."""
        return {
            "filters": self.filters,
            "filtered": any(self.filters.values()),
            "first": not self.page_token,
            "following": self._page(next_page_token) if next_page_token else "",
            "beginning": self._page(""),
        }

    def _page(self, token: str) -> str:
        return "?" + urlencode({name: value for name, value in {**self.filters, "page_token": token}.items() if value})
