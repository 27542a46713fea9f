"""Ids of responses, by which OpenAI's clients name jobs: `resp_` and the workflow id in base64url without padding.

Nothing is stored: the id of a response says which job it is, at every gateway and notifier.
"""

import base64
from typing import Final

from jobs.ids import WORKFLOW_ID_PATTERN

_PREFIX: Final = "resp_"


def response_id(workflow_id: str) -> str:
    """Return the id of the response that a job produces."""
    return _PREFIX + base64.urlsafe_b64encode(workflow_id.encode()).decode().rstrip("=")


def workflow_id_of(id_: str) -> str:
    """Return the workflow id of the job that produces a response.

    Raises ValueError for a text that response_id() returns for no workflow id, so that a job has one id alone.
    """
    encoded = id_.removeprefix(_PREFIX)
    try:
        workflow_id = base64.urlsafe_b64decode(encoded + "=" * (-len(encoded) % 4)).decode()
    except ValueError as error:
        # It is no base64, or no text.
        raise _no_response_id() from error
    # Base64 has several texts for the same bytes, and Python's decoder skips what is none.
    if WORKFLOW_ID_PATTERN.fullmatch(workflow_id) is None or response_id(workflow_id) != id_:
        raise _no_response_id()
    return workflow_id


def _no_response_id() -> ValueError:
    return ValueError(f"is no id of a response: it must be {_PREFIX!r} and a workflow id in base64url without padding")
