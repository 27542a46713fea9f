"""The operator's price list, as it stands in GATEWAY_MODELS."""

import re
from decimal import Decimal
from typing import Annotated, Final

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from llm_pb import llm_pb2

_MICROS: Final = 1_000_000
_CURRENCY: Final = re.compile(r"[A-Za-z]{1,16}")
_Amount = Annotated[Decimal, Field(ge=0, le=1_000_000, decimal_places=6)]


def _currency(name: str) -> str:
    if _CURRENCY.fullmatch(name) is None:
        raise ValueError("must have 1 to 16 letters, such as EUR")
    return name


class Price(BaseModel):
    """What a model costs."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    currency: Annotated[str, AfterValidator(_currency)]
    """The name of the currency: "EUR". The same for all models."""
    prompt_per_million: _Amount
    """The price of a million prompt tokens in the currency, with at most six decimal places: "0.15"."""
    output_per_million: _Amount
    """The price of a million output tokens, likewise."""

    def message(self) -> llm_pb2.ModelPrice:
        """Return the price as jobs and clients get it."""
        return llm_pb2.ModelPrice(
            currency=self.currency,
            prompt_micros_per_million=int(self.prompt_per_million * _MICROS),
            output_micros_per_million=int(self.output_per_million * _MICROS),
        )
