"""Fair turns of tenants and their users, and what a parent passes on to its children."""

from functools import partial

from temporalio.common import Priority

from jobs import classes, names
from jobs.ids import tenant_of
from jobs.options import DEFAULTS, gpu_priority
from jobs.start import fair_owner, fair_turns, job_start
from llm_pb import common_pb2, llm_pb2
from services.gateway.tenants import TenantSettings
from services.gateway.turns import Turns


class Clock:
    """Seconds that pass when a test says so."""

    def __init__(self) -> None:
        self.seconds = 1000.0

    def __call__(self) -> float:
        return self.seconds


def turns(clock: Clock) -> Turns:
    return Turns({"acme": TenantSettings(weight=4)}, clock)


def test_a_tenants_users_share_its_weight() -> None:
    """Those who have submitted nothing for some minutes do not count."""
    clock = Clock()
    some = turns(clock)
    assert some.priority("acme", "a") == Priority(fairness_key="acme/a", fairness_weight=4)
    assert some.priority("acme", "b") == Priority(fairness_key="acme/b", fairness_weight=2)
    assert some.priority("acme", "a").fairness_weight == 2
    assert some.priority("other", "a") == Priority(fairness_key="other/a", fairness_weight=1)
    clock.seconds += 200
    assert some.priority("acme", "b").fairness_weight == 2
    clock.seconds += 200
    assert some.priority("acme", "b").fairness_weight == 4


def test_users_without_a_tenant_take_turns_as_ever() -> None:
    some = turns(Clock())
    for user in ("a", "b"):
        assert some.priority("", user) == Priority(fairness_key=user)


def test_a_tenant_gets_a_bounded_share_by_the_first_jobs_of_invented_users() -> None:
    """The docs say how much: each job keeps the share that its user had when it was sent."""
    some = turns(Clock())
    first = [some.priority("acme", f"user-{number}").fairness_weight or 0 for number in range(100)]
    assert 5 * 4 < sum(first) < 5.2 * 4
    assert sum(some.priority("acme", f"user-{number}").fairness_weight or 0 for number in range(100)) <= 4 + 0.01


def test_a_tenant_gets_no_larger_share_by_inventing_users() -> None:
    """However many there are, their turns weigh at most twice what the tenant's should; in one burst six times.

    Each new user of a burst shares the weight with those before, which keep what they had until their next job.
    """
    burst = turns(Clock())
    first = {
        one.fairness_key: one.fairness_weight or 0 for one in (burst.priority("acme", f"{n}") for n in range(10_000))
    }
    assert len(first) <= 200
    assert sum(first.values()) <= 6.2 * 4
    some = turns(Clock())
    weights = {}
    for number in range(10_000):
        one = some.priority("acme", f"user-{number}")
        assert one.fairness_key is not None
        weights[one.fairness_key] = one.fairness_weight or 0
    for number in range(100):
        one = some.priority("acme", f"user-{number}")
        weights[one.fairness_key or ""] = one.fairness_weight or 0
    assert len(weights) <= 200
    assert sum(weights.values()) <= 2 * 4 + 0.01


def test_a_long_key_keeps_its_tenant() -> None:
    """Nobody chooses a user that takes another tenant's turns."""
    user, tenant = "u" * 128, "t" * 32
    keys = [fair_turns(key).fairness_key or "" for key in (user, f"{tenant}/{user}", f"{tenant}/{user}x")]
    assert [len(key) for key in keys] == [64, 64, 64]
    assert len({*keys}) == 3
    assert [key.startswith(f"{tenant}/") for key in keys] == [False, True, True]


def test_a_long_key_keeps_its_class() -> None:
    """Of a tenant of 32 characters, too, two users of a class have two keys."""
    long, longer = "u" * 128, "u" * 127
    owners = {
        fair_owner(user, tenant, None, job_class)
        for user in (long, longer)
        for tenant in ("", "t" * 32)
        for job_class in classes.NAMES
    }
    keys = {fair_turns(owner).fairness_key or "" for owner in owners}
    assert len(keys) == len(owners) == 16
    assert all(len(key) <= 64 for key in keys)
    for name in ("HIGH", "BACKGROUND", "SCHEDULED"):
        assert sum(key.startswith((f"/{name}/", f"{'t' * 32}/{name}/")) for key in keys) == 4


def test_a_tenant_has_turns_of_its_own_in_each_class() -> None:
    """Users who submit jobs of one class do not count among those who share the turns of another one."""
    some = turns(Clock())
    high = partial(some.priority, "acme", hash_=None, job_class=common_pb2.JOB_CLASS_HIGH)
    assert some.priority("acme", "a") == Priority(fairness_key="acme/a", fairness_weight=4)
    assert high("a") == Priority(fairness_key="acme/HIGH/a", fairness_weight=8)
    assert high("b") == Priority(fairness_key="acme/HIGH/b", fairness_weight=4)
    assert some.priority("acme", "a").fairness_weight == 4


def test_a_child_is_its_parents_tenants() -> None:
    """It takes the turns of its parent."""
    job = llm_pb2.JobRequest(user_id="alice", request_id="1", model="m", prompt="p")
    parent = turns(Clock()).priority("acme", "alice")
    start = job_start(job, DEFAULTS, id_="llmpipeline--acme-alice-1/draft", priority=parent)
    assert tenant_of(start.id) == start.search_attributes[names.TENANT_ID] == "acme"
    assert start.priority == parent
    assert gpu_priority(job, start.priority) == Priority(
        priority_key=3, fairness_key="acme/alice", fairness_weight=parent.fairness_weight
    )


def test_a_job_without_a_tenant_starts_as_ever() -> None:
    job = llm_pb2.JobRequest(user_id="alice", request_id="1", model="m", prompt="p")
    start = job_start(job, DEFAULTS)
    assert start.id == "llmjob-alice-1"
    assert start.priority == Priority(fairness_key="alice")
    assert {pair.key.name for pair in start.search_attributes} == {"UserID", "RequestID", "Model"}
