"""Seats: who gets one, who gives it up, and what becomes of output that comes in that moment."""

import asyncio
import dataclasses
from collections.abc import AsyncGenerator, Iterator
from contextlib import ExitStack
from datetime import timedelta
from types import SimpleNamespace

import pytest
from temporalio.testing import ActivityEnvironment

from jobs.errors import EngineFailed
from llm_pb import common_pb2, internal_pb2, llm_pb2
from services.gpu_worker.batch.item_attempt import ItemWaits
from services.gpu_worker.engines.engine import Output
from services.gpu_worker.seat_waits import SeatWaits
from services.gpu_worker.seats import Seat, Seats

HIGH, STANDARD = common_pb2.JOB_CLASS_HIGH, common_pb2.JOB_CLASS_STANDARD
BACKGROUND, SCHEDULED = common_pb2.JOB_CLASS_BACKGROUND, common_pb2.JOB_CLASS_SCHEDULED


@pytest.fixture
def present() -> Iterator[ExitStack]:
    with ExitStack() as opened:
        yield opened


def attempt(seats: Seats, job_class: "common_pb2.JobClass.ValueType", created: int, present: ExitStack) -> Seat:
    """Let an attempt at a job that was submitted at `created` ask for a seat."""
    request = internal_pb2.RunRequest(job=llm_pb2.JobRequest(job_class=job_class))
    request.create_time.FromSeconds(created)
    seat = present.enter_context(seats.attempt(request))
    seat.ask()
    return seat


async def test_the_youngest_background_attempt_makes_way_and_scheduled_ones_before(present: ExitStack) -> None:
    seats = Seats(4, 1)
    scheduled = attempt(seats, SCHEDULED, 1, present)
    young, old, middle = [attempt(seats, BACKGROUND, created, present) for created in (9, 2, 5)]
    assert all(seat.taken and not seat.leaving for seat in (scheduled, young, old, middle))
    for expected in (scheduled, young, middle):
        urgent = attempt(seats, STANDARD, 10, present)
        assert not urgent.taken
        assert expected.leaving
        expected.free()
        assert urgent.taken
        assert not expected.ask()
    # The last one is the background's own.
    attempt(seats, HIGH, 11, present)
    assert not old.leaving


@pytest.mark.parametrize("job_class", [HIGH, STANDARD, BACKGROUND])
async def test_an_item_of_a_batch_makes_way_for_every_interactive_job(
    job_class: "common_pb2.JobClass.ValueType", present: ExitStack
) -> None:
    """Whatever the class of its batch, and although it is older."""
    seats, request = Seats(1, 0), internal_pb2.RunRequest(job=llm_pb2.JobRequest(job_class=job_class))
    item = present.enter_context(seats.attempt(request, item=True))
    assert item.ask()
    assert seats.slots(background=False) == 1
    job = attempt(seats, STANDARD, 10, present)
    assert item.leaving
    item.free()
    assert not item.ask()
    assert job.taken
    job.free()
    assert item.taken


async def test_the_class_of_a_batch_orders_it_among_background_work(present: ExitStack) -> None:
    seats, request = Seats(1, 0), internal_pb2.RunRequest(job=llm_pb2.JobRequest(job_class=STANDARD))
    request.create_time.FromSeconds(5)
    running, job = [attempt(seats, BACKGROUND, created, present) for created in (1, 2)]
    item = present.enter_context(seats.attempt(request, item=True))
    item.ask()
    # Background work does not make way for it.
    assert not running.leaving
    running.free()
    assert (item.taken, job.taken) == (True, False)


async def test_one_seat_is_asked_for_each_that_needs_one(present: ExitStack) -> None:
    seats = Seats(3, 0)
    held = [attempt(seats, BACKGROUND, created, present) for created in range(3)]
    for number in range(1, 3):
        attempt(seats, HIGH, 9, present)
        assert sum(seat.leaving for seat in held) == number


async def test_a_seat_goes_by_class_and_then_to_the_older_job(present: ExitStack) -> None:
    seats = Seats(1, 0)
    (running,) = [attempt(seats, HIGH, 0, present)]
    order = [(HIGH, 3), (STANDARD, 1), (STANDARD, 2), (BACKGROUND, 1), (BACKGROUND, 4), (SCHEDULED, 0)]
    waiting = {key: attempt(seats, *key, present) for key in sorted(order, key=str)}
    for key in order:
        running.free()
        assert [other for other, seat in waiting.items() if seat.taken] == [key]
        running = waiting.pop(key)


async def test_background_attempts_below_their_minimum_go_first(present: ExitStack) -> None:
    """They get the next seat that others free."""
    seats = Seats(2, 1)
    running, _ = [attempt(seats, HIGH, 0, present) for _ in range(2)]
    background, urgent = attempt(seats, BACKGROUND, 1, present), attempt(seats, HIGH, 1, present)
    assert not background.taken
    running.free()
    assert (background.taken, urgent.taken) == (True, False)


async def test_a_worker_with_one_seat_keeps_none_for_the_background(present: ExitStack) -> None:
    seats = Seats(1, 1)
    background = attempt(seats, BACKGROUND, 0, present)
    attempt(seats, STANDARD, 1, present)
    assert background.leaving


async def test_an_attempt_that_ends_or_gives_up_its_wait_leaves_its_seat() -> None:
    seats = Seats(1, 0)
    with ExitStack() as present:
        running = attempt(seats, HIGH, 0, present)
        with ExitStack() as gone:
            attempt(seats, HIGH, 1, gone)
        with ExitStack() as last:
            waiting = attempt(seats, HIGH, 2, last)
            with pytest.raises(TimeoutError):
                await waiting.wait(0.01)
            present.close()
            assert not running.taken
            await waiting.wait(60)
            assert seats.in_use == 1
    assert seats.in_use == 0


async def test_slots_follow_the_attempts_that_are_there(present: ExitStack) -> None:
    """A poll asks for no job that would have to wait for a seat."""
    seats = Seats(3, 1)
    assert (seats.slots(background=False), seats.slots(background=True)) == (3, 3)
    attempt(seats, BACKGROUND, 0, present)
    assert (seats.slots(background=False), seats.slots(background=True)) == (2, 3)
    for _ in range(2):
        attempt(seats, HIGH, 0, present)
    assert (seats.slots(background=False), seats.slots(background=True)) == (2, 1)


async def outputs(numbers: list[int], closed: asyncio.Event) -> AsyncGenerator[Output, None]:
    """Yield an output for each number, then wait for ever."""
    try:
        for number in numbers:
            yield Output(str(number), (number,), 1)
        await asyncio.Event().wait()
    finally:
        closed.set()


async def test_a_wait_for_output_ends_when_the_seat_is_to_be_freed(present: ExitStack) -> None:
    seats, closed = Seats(1, 0), asyncio.Event()
    background = attempt(seats, BACKGROUND, 0, present)
    generator = outputs([1], closed)
    first = await background.next(generator)
    assert first is not None
    assert first.text == "1"
    waiting = asyncio.create_task(background.next(generator))
    await asyncio.sleep(0)
    attempt(seats, HIGH, 1, present)
    assert await waiting is None
    assert closed.is_set()
    assert await background.next(generator) is None
    background.free()
    background.leave_at(asyncio.get_running_loop().time())
    assert await background.next(outputs([], closed)) is None


async def test_a_cancel_is_no_pause(present: ExitStack) -> None:
    """Not even in the moment in which the seat is to be freed."""
    background = attempt(Seats(1, 0), BACKGROUND, 0, present)
    waiting = asyncio.create_task(background.next(outputs([], asyncio.Event())))
    await asyncio.sleep(0)
    background.leave()
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting


async def test_an_engine_that_ends_without_a_reason_has_failed(present: ExitStack) -> None:
    async def nothing() -> AsyncGenerator[Output, None]:
        for output in ():
            yield output

    with pytest.raises(EngineFailed, match="without a finish reason"):
        await attempt(Seats(1, 0), STANDARD, 0, present).next(nothing())


class Attempting:
    """The part of an attempt that its waits use."""

    def __init__(self) -> None:
        self.times = SimpleNamespace(pauses=0)
        self.output_bytes = 0

    async def enter(self, stage: str) -> None:
        """Enter a stage."""


async def test_an_attempt_that_has_waited_leaves_in_time_although_it_finds_a_seat_at_once(present: ExitStack) -> None:
    """Its waits have used up a part of its time, for which the job is not to blame."""
    seats, request = Seats(1, 0), internal_pb2.RunRequest(job=llm_pb2.JobRequest(job_class=BACKGROUND))

    async def attempt_of_an_activity() -> None:
        seat = present.enter_context(seats.attempt(request))
        waits = SeatWaits(Attempting(), seat, request, timedelta(minutes=1))  # type: ignore[arg-type]
        urgent = attempt(seats, HIGH, 0, present)
        waiting = asyncio.create_task(waits.take_seat())
        await asyncio.sleep(0)
        assert not waiting.done()
        urgent.free()
        await waiting
        waits.pause()
        await waits.take_seat()
        assert seat.taken
        async with asyncio.timeout(10):
            while not seat.leaving:  # noqa: ASYNC110
                await asyncio.sleep(0.01)

    environment = ActivityEnvironment()
    environment.info = dataclasses.replace(environment.info, start_to_close_timeout=timedelta(seconds=1))
    await environment.run(attempt_of_an_activity)


async def test_the_time_of_an_item_stands_still_while_it_is_paused(present: ExitStack) -> None:
    """Its limit goes on with what was left. A batch may be paused for longer than an attempt may take."""
    seats, request = Seats(1, 0), internal_pb2.RunRequest(job=llm_pb2.JobRequest(job_class=BACKGROUND))
    seat, resumed = present.enter_context(seats.attempt(request, item=True)), asyncio.Event()

    async def attempt_at_item() -> None:
        async with asyncio.timeout(0.5) as limit:
            waits = ItemWaits(Attempting(), seat, limit)  # type: ignore[arg-type]
            await waits.take_seat()
            urgent = attempt(seats, HIGH, 0, present)
            assert seat.leaving
            waits.pause()
            # Only time shows that a timer does not run.
            asyncio.get_running_loop().call_later(0.8, urgent.free)
            await waits.take_seat()
            resumed.set()
            await asyncio.Event().wait()

    with pytest.raises(TimeoutError):
        await attempt_at_item()
    assert resumed.is_set()
