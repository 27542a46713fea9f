"""The program of bench.three_steps, as its ways share it: each step asks the upstream, given the last text."""

from typing import Final

STEPS: Final = ("outline", "draft", "edit")
MODEL: Final = "docstrings"
MAX_TOKENS: Final = 16
QUEUE: Final = "bench-openai-agents"
WORKFLOW: Final = "ThreeSteps"


def prompt_of(run: str, step: str, text: str) -> str:
    """Return the prompt of a step. `run` is a word, and `text` is what the step before has returned."""
    return f"{run} {step} {text}"
