"""The operator's price list, as it stands in GATEWAY_MODELS."""

from decimal import Decimal
from typing import Annotated, Final

from pydantic import BaseModel, ConfigDict, Field

from llm_pb import llm_pb2

_MICROS: Final = 1_000_000
_Amount = Annotated[Decimal, Field(ge=0, le=1_000_000, decimal_places=6)]


class Price(BaseModel):
    """What a model costs."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    currency: str = Field(pattern=r"^[A-Za-z]{1,16}$")
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
