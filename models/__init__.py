"""The small trained model of the tests and the first run, and the code that trains it."""

from pathlib import Path
from typing import Final

DOCSTRINGS: Final = Path(__file__).parent / "docstrings"
"""Folder of the model, in Hugging Face format. A wheel contains it as well."""
