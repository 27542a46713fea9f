"""The small trained model of the tests and the first run, and how it was made."""

from pathlib import Path
from typing import Final

DOCSTRINGS: Final = Path(__file__).parent / "docstrings"
"""The folder of the model, in Hugging Face format. A wheel holds it, too."""
