"""Costs and prices as people write them."""

from llm_pb import llm_pb2


def amount(micros: int) -> str:
    """Return millionths of a currency in units of it: exact, with at least two decimal places."""
    whole, rest = divmod(micros, 1_000_000)
    return f"{whole}.{f'{rest:06}'.rstrip('0'):0<2}"


def price_text(price: llm_pb2.ModelPrice) -> str:
    """Return what a million tokens of the prompt and of the output cost."""
    prompt, output = amount(price.prompt_micros_per_million), amount(price.output_micros_per_million)
    return f"{prompt} + {output} {price.currency}/M"
