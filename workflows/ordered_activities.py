"""Activities of the gateway from whose end commands of a workflow follow, while something else makes commands, too."""

from collections.abc import Awaitable, Callable
from datetime import timedelta
from typing import Any, TypeVar

from temporalio import workflow
from temporalio.common import RetryPolicy

with workflow.unsafe.imports_passed_through():
    from jobs import names

_R = TypeVar("_R")


def start_in_order(
    activity: Callable[..., Awaitable[_R]],
    *arguments: Any,
    start_to_close_timeout: timedelta,
    schedule_to_close_timeout: timedelta | None = None,
    retry_policy: RetryPolicy | None = None,
) -> workflow.ActivityHandle[_R]:
    """Start an activity whose end a replay gets in the workflow task of the run.

    In workflows of earlier versions the activity is local: see PATCH_ORDERED. A local one raises what has failed it,
    in no ActivityError.
    """
    ordered = workflow.patched(names.PATCH_ORDERED)
    start = workflow.start_activity if ordered else workflow.start_local_activity
    return start(
        activity,
        args=arguments,
        start_to_close_timeout=start_to_close_timeout,
        schedule_to_close_timeout=schedule_to_close_timeout,
        retry_policy=retry_policy,
    )
