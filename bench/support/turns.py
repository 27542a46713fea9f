"""A simulation of Temporal's fair turns at a task queue of several partitions.

Modelled as Temporal's matching does it: a task goes to a partition at random, and so does the poll of a seat that is
free. Each partition gives out its own tasks by fair turns of their keys: a key's tasks are numbered from the turn that
the partition has reached. A poll that finds its partition empty is forwarded, so that it gets a task of another one.
Not modelled: the time that Temporal takes to give a task out. It is what the real queue of bench.queue_partitions adds.
"""

import heapq
import random
from collections.abc import Iterator
from itertools import count


class Queue:
    """A task queue. A task is known by the fairness key of its user."""

    def __init__(self, partitions: int, chance: random.Random) -> None:
        self._chance = chance
        self._partitions = [_Partition() for _ in range(partitions)]
        self._waiting = 0

    def add(self, key: str) -> None:
        """Add a task."""
        self._chance.choice(self._partitions).add(key)
        self._waiting += 1

    def poll(self) -> str | None:
        """Take a task and return its key. None: no task waits."""
        if self._waiting == 0:
            return None
        self._waiting -= 1
        chosen = self._chance.choice(self._partitions)
        if not chosen.waiting:
            chosen = self._chance.choice([each for each in self._partitions if each.waiting])
        return chosen.take()


class _Partition:
    def __init__(self) -> None:
        self.waiting: list[tuple[int, int, str]] = []
        self._turn = 0
        self._last: dict[str, int] = {}
        self._order = count()

    def add(self, key: str) -> None:
        turn = max(self._turn, self._last.get(key, 0)) + 1
        self._last[key] = turn
        heapq.heappush(self.waiting, (turn, next(self._order), key))

    def take(self) -> str:
        self._turn, _, key = heapq.heappop(self.waiting)
        return key


def seconds_behind(
    *, partitions: int, seats: int, job_seconds: float, many: int, few: int, chance: random.Random
) -> Iterator[float]:
    """Yield the waits in seconds of `few` jobs of a user, in the order of their starts.

    They come to a queue in which `many` jobs of another user wait, and whose seats are all taken, each for another part
    of a job's time.
    """
    queue = Queue(partitions, chance)
    for _ in range(many):
        queue.add("many")
    for _ in range(few):
        queue.add("few")
    free = [chance.uniform(0, job_seconds) for _ in range(seats)]
    heapq.heapify(free)
    left = few
    while left > 0:
        now = heapq.heappop(free)
        if queue.poll() == "few":
            left -= 1
            yield now
        heapq.heappush(free, now + job_seconds)


def waits_of_arrivals(
    *, queues: int, seats: int, job_seconds: float, load: float, jobs: int, chance: random.Random
) -> Iterator[float]:
    """Yield the waits in seconds of jobs that arrive by chance, each for one of the queues, which share the seats.

    `seats` is the number of all seats, `load` the part of their time that the jobs need. The times of jobs are
    exponential. The first half of the jobs only fills the seats.
    """
    free = [[0.0] * (seats // queues) for _ in range(queues)]
    now = 0.0
    for number in range(jobs):
        now += chance.expovariate(load * seats / job_seconds)
        own = free[chance.randrange(queues)]
        start = max(now, own[0])
        heapq.heapreplace(own, start + chance.expovariate(1 / job_seconds))
        if number >= jobs // 2:
            yield start - now
