"""How lanes end: within their bound, with everything closed, whatever they are doing at the time."""

from __future__ import annotations

import asyncio

import pytest

from pipeline import lanes as lanes_module
from pipeline.errors import ServiceUnavailable
from tests.lane_fakes import A, B, FakeConsumer, failing, make_consumer, until, waiting

pytestmark = [pytest.mark.unit, pytest.mark.usefixtures("short_pauses")]


async def test_an_ending_lane_gives_its_batch_time(consumer: FakeConsumer) -> None:
    """The batch in flight is finished, no other is begun, and the partition is closed when `end` returns."""
    gate = asyncio.Event()
    role = consumer.role
    role.before[A].append(waiting(gate))
    await consumer.assign(A, B)
    consumer.feed(A, 2)
    await until(lambda: role.in_flight[A])
    consumer.feed(A, 2)

    ending = asyncio.create_task(consumer.lanes.end())
    await until(lambda: role.story[B][-1] == "closed")
    assert A not in consumer.lanes.with_room
    assert not consumer.lanes.ready
    gate.set()
    await ending

    assert role.taken[A] == [0, 1]
    assert role.story[A] == ["opening", "opened", "closing", "closed"]
    assert consumer.lanes.status() == {}


async def test_a_batch_that_takes_too_long_is_cancelled() -> None:
    """It hears of it, leaves no trace, and its partition is closed before `end` returns."""
    consumer = make_consumer(revoke_timeout_ms=50)
    role = consumer.role
    role.before[A].append(waiting(asyncio.Event()))
    await consumer.assign(A)
    consumer.feed(A, 2)
    await until(lambda: role.in_flight[A])

    await consumer.lanes.end()

    assert role.story[A] == ["opening", "opened", "cancelled", "closing", "closed"]
    assert (role.taken[A], role.in_flight[A]) == ([], 0)


@pytest.mark.parametrize("moment", ["opening", "idle", "pausing"])
async def test_a_lane_with_nothing_in_flight_ends_at_once(
    consumer: FakeConsumer, moment: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever it is waiting for; it is closed exactly as often as it was opened, or once more."""
    role = consumer.role
    if moment == "opening":
        role.opening[A].append(waiting(asyncio.Event()))
    elif moment == "pausing":
        monkeypatch.setattr(lanes_module, "_BACKOFF_BASE_SECONDS", 1000)
        monkeypatch.setattr(lanes_module, "_BACKOFF_CAP_SECONDS", 1000)
        role.opening[A].append(failing(ServiceUnavailable("away")))
    consumer.lanes.assign({A})
    await until(lambda: role.story[A][-1:] == [{"opening": "opening", "idle": "opened", "pausing": "closed"}[moment]])

    async with asyncio.timeout(5):
        await consumer.lanes.end()

    assert role.story[A][-2:] == ["closing", "closed"]
    assert role.story[A].count("closed") == 1
    await consumer.lanes.end()


async def test_an_ending_lane_lets_its_partition_be_closed(consumer: FakeConsumer) -> None:
    """A close that is under way after a failure is not broken off: it would leave a connection behind."""
    gate = asyncio.Event()
    role = consumer.role
    role.before[A].append(failing(ServiceUnavailable("away")))
    role.closing[A].append(waiting(gate))
    await consumer.assign(A)
    consumer.feed(A, 1)
    await until(lambda: role.story[A][-1] == "closing")

    ending = asyncio.create_task(consumer.lanes.end())
    await asyncio.sleep(0)
    gate.set()
    await ending

    assert role.story[A] == ["opening", "opened", "closing", "closed"]


async def test_a_close_that_hangs_holds_up_no_rebalance() -> None:
    """The bound for revoked partitions holds for the whole end, not only for the batch in flight."""
    consumer = make_consumer(revoke_timeout_ms=50)
    role = consumer.role
    role.before[A].append(waiting(asyncio.Event()))
    role.closing[A].append(waiting(asyncio.Event()))
    await consumer.assign(A)
    consumer.feed(A, 1)
    await until(lambda: role.in_flight[A])

    async with asyncio.timeout(5):
        await consumer.lanes.end()

    assert role.story[A][-1] == "closing"


async def test_what_belongs_to_others_is_forgotten(consumer: FakeConsumer) -> None:
    """An assignment tells the role which state to keep; the end of the node keeps none."""
    assert not consumer.lanes.ready
    await consumer.assign(A, B)
    await consumer.lanes.end()
    await consumer.assign(B)
    assert consumer.lanes.status() == {1: "live"}
    await consumer.lanes.aclose()
    await consumer.assign()
    assert consumer.role.retained == [{A, B}, {B}, set(), set()]
