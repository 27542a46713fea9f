"""The tree of errors and the table of their rules agree."""

from collections.abc import Iterator

import pytest
from google.rpc import code_pb2, status_pb2

from jobs import application_errors, errors
from jobs.outcome import final_state
from llm_pb import llm_pb2
from tests.support.jobs import unpack


def tree(root: type[errors.JobError], depth: int = 0) -> Iterator[tuple[int, type[errors.JobError]]]:
    for error in root.__subclasses__():
        yield depth, error
        yield from tree(error, depth + 1)


TREE = list(tree(errors.JobError))
BRANCHES = [error for _, error in TREE if error.__subclasses__()]
LEAVES = [error for _, error in TREE if not error.__subclasses__()]


def test_no_error_is_missing_from_the_table() -> None:
    """Every error that is raised has a rule. A branch is only caught, so it has neither a rule nor a reason."""
    assert list(errors.RULES) == LEAVES
    assert not [branch for branch in BRANCHES if hasattr(branch, "reason")]
    assert not [leaf for leaf in LEAVES if "reason" not in vars(leaf)]


def test_the_docstring_draws_the_whole_tree() -> None:
    assert errors.__doc__ is not None
    lines = [line.split("── ") for line in errors.__doc__.splitlines() if "── " in line]
    drawn = [((len(indent) - 5) // 4, rest.split()[0]) for indent, rest in lines]
    assert drawn == [(depth, error.__name__) for depth, error in TREE]


@pytest.mark.parametrize(
    ("branch", "codes", "retryable"),
    [
        (errors.JobRejected, {"INVALID_ARGUMENT", "NOT_FOUND", "OUT_OF_RANGE", "RESOURCE_EXHAUSTED"}, {False}),
        (errors.EngineError, {"UNAVAILABLE", "RESOURCE_EXHAUSTED"}, {True}),
        (errors.WorkerGone, {"UNAVAILABLE"}, {True}),
        (errors.TimedOut, {"DEADLINE_EXCEEDED"}, {True, False}),
        (errors.Stopped, {"CANCELLED", "ABORTED"}, {False}),
        (errors.DeliveryError, {"UNAVAILABLE", "FAILED_PRECONDITION"}, {True, False}),
    ],
    ids=lambda value: value.__name__ if isinstance(value, type) else "",
)
def test_the_errors_of_a_branch_have_its_meaning(
    branch: type[errors.JobError], codes: set[str], retryable: set[bool]
) -> None:
    rules = [rule for error, rule in errors.RULES.items() if issubclass(error, branch)]
    assert {code_pb2.Code.Name(rule.code) for rule in rules} == codes
    assert {rule.retryable for rule in rules} == retryable


def test_only_another_attempt_can_be_handed_over_or_come_sooner() -> None:
    for kind, rule in errors.RULES.items():
        assert rule.retryable or not (rule.handed_over or rule.retry_delay), kind
        # The workflow starts the attempt that follows a handover, so Temporal cannot delay it.
        assert not (rule.handed_over and rule.retry_delay), kind


def test_reasons_are_unique() -> None:
    assert len(errors.BY_REASON) == len(errors.RULES)


@pytest.mark.parametrize("kind", errors.RULES, ids=lambda kind: kind.__name__)
def test_an_error_travels_whole(kind: type[errors.JobError]) -> None:
    """Temporal gets the type and whether to retry. A client gets the code, the message and the reason."""
    of_job = application_errors.to_application_error(kind("why"))
    assert errors.BY_REASON[of_job.type or ""] is kind
    assert of_job.non_retryable is not errors.RULES[kind].retryable
    assert of_job.next_retry_delay is None
    status = errors.to_status(kind("why"))
    assert code_pb2.Code.Name(status.code) != "OK"
    assert status.message == "why"
    assert unpack(status)["ErrorInfo"].reason == kind.reason
    assert errors.rule_of(status) == errors.RULES[kind]


@pytest.mark.parametrize("kind", errors.RULES, ids=lambda kind: kind.__name__)
def test_an_attempts_error_tells_temporal_what_the_table_says(kind: type[errors.JobError]) -> None:
    """Temporal retries a retryable error after the delay of the table, and leaves a handover to the workflow."""
    partial = llm_pb2.JobResult(output="so far")
    of_attempt = application_errors.to_attempt_error(kind("why"), partial)
    rule = errors.RULES[kind]
    assert (of_attempt.type, of_attempt.message) == (kind.reason, "why")
    assert of_attempt.non_retryable == (rule.handed_over or not rule.retryable)
    assert of_attempt.next_retry_delay == rule.retry_delay
    assert application_errors.partial_result(of_attempt) == partial


def test_a_stopped_worker_hands_over_and_a_dead_engine_is_replaced_at_once() -> None:
    assert {kind for kind, rule in errors.RULES.items() if rule.handed_over} == {errors.WorkerShutdown}
    assert {kind for kind, rule in errors.RULES.items() if rule.retry_delay} == {errors.EngineDead}


def test_a_job_that_ran_out_of_time_or_was_stopped_says_so_in_its_state() -> None:
    by_branch = {
        errors.TimedOut: llm_pb2.JOB_STATE_TIMED_OUT,
        errors.Stopped: llm_pb2.JOB_STATE_CANCELLED,
    }
    for kind in errors.RULES:
        expected = [state for branch, state in by_branch.items() if issubclass(kind, branch)]
        assert final_state(kind("why")) == (expected or [llm_pb2.JOB_STATE_FAILED])[0], kind


def test_a_status_of_no_job_has_no_rule() -> None:
    assert errors.rule_of(status_pb2.Status()) is None
    assert (
        errors.rule_of(errors.make_status(code_pb2.UNAVAILABLE, "why", errors.error_info("GATEWAY_SHUTDOWN"))) is None
    )


def test_an_engines_pages_of_words_are_cut() -> None:
    """A status must fit into Temporal's memo and gRPC's trailers."""
    error = errors.EngineFailed("why " * 100_000)
    for message in (errors.to_status(error).message, application_errors.to_application_error(error).message):
        assert message.startswith("why why")
        assert len(message) <= 2000
