"""Where signing in leads back to."""

import pytest

from services.http.signin.next_page import HOME, checked


@pytest.mark.parametrize("path", ["/console/jobs/llmjob-a-b%2Fc", "/console/?state=JOB_STATE_FAILED&user_id=..%2F"])
def test_a_page_of_the_console_is_kept(path: str) -> None:
    assert checked(path) == path


@pytest.mark.parametrize(
    "path",
    [
        "/console/../jobs",
        "/console/..//evil.example",
        "/console/%2e%2E/jobs",
        "/console/.%2e",
        "//evil.example",
        "/jobs",
    ],
)
def test_another_place_is_the_first_page(path: str) -> None:
    assert checked(path) == HOME
