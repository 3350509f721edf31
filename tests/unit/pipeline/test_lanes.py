"""Lanes: one batch in flight per partition, in order, and nothing lost or doubled whatever goes wrong."""

from __future__ import annotations

import asyncio
import random

import pytest
from faust.types import TP
from structlog.testing import capture_logs

from pipeline import lanes as lanes_module
from pipeline.errors import BatchAborted, PartitionFenced, PositionLost, ServiceUnavailable
from pipeline.lanes import Lanes
from pipeline.settings import Settings
from tests.lane_fakes import (
    BYTES_MAX,
    RECORDS_MAX,
    A,
    B,
    FakeConsumer,
    FakeRecord,
    failing,
    make_consumer,
    nothing,
    until,
    waiting,
)

pytestmark = [pytest.mark.unit, pytest.mark.usefixtures("short_pauses")]


async def test_records_gather_while_a_batch_is_in_flight(consumer: FakeConsumer) -> None:
    """One batch at a time, in order; what came meanwhile is the next one, as a whole."""
    gate = asyncio.Event()
    role = consumer.role
    role.before[A].append(waiting(gate))
    await consumer.assign(A)

    consumer.feed(A, 2)
    await until(lambda: role.in_flight[A])
    consumer.feed(A, 1)
    consumer.feed(A, 2)
    assert len(consumer.delivered) == 1
    gate.set()
    await until(lambda: len(role.taken[A]) == 5)

    assert role.batches[A] == [[0, 1], [2, 3, 4]]
    assert [batch.next_offset for batch in consumer.delivered] == [2, 5]


async def test_a_lane_takes_no_more_than_its_bounds(consumer: FakeConsumer) -> None:
    """Records are fetched while there is room; a batch is cut at its bound; room again wakes the fetcher."""
    gate = asyncio.Event()
    role, room = consumer.role, consumer.lanes.with_room
    assert A not in room
    role.before[A].append(waiting(gate))
    await consumer.assign(A)
    consumer.feed(A, 1)
    await until(lambda: role.in_flight[A])

    consumer.feed(A, RECORDS_MAX - 1)
    assert A in room
    consumer.feed(A, RECORDS_MAX)  # one fetch may bring more than there is room for
    assert A not in room
    assert consumer.wakes == 0
    gate.set()
    await until(lambda: len(role.taken[A]) == 2 * RECORDS_MAX)

    assert [len(batch) for batch in role.batches[A]] == [1, RECORDS_MAX, RECORDS_MAX - 1]
    assert A in room
    assert consumer.wakes == 1


async def test_a_lane_takes_no_more_bytes_than_its_bound(consumer: FakeConsumer) -> None:
    """Few big records fill it as many small ones do."""
    gate = asyncio.Event()
    consumer.role.before[A].append(waiting(gate))
    await consumer.assign(A)
    consumer.feed(A, 1)
    await until(lambda: consumer.role.in_flight[A])

    consumer.feed(A, 1, b"x" * (BYTES_MAX - 2))
    assert A in consumer.lanes.with_room
    consumer.feed(A, 1)
    assert A not in consumer.lanes.with_room
    gate.set()
    await until(lambda: len(consumer.role.taken[A]) == 3)
    assert A in consumer.lanes.with_room


def test_no_partition_with_room_is_not_every_partition() -> None:
    """To aiokafka an empty collection means all partitions; the view of those with room is never so empty."""
    assert bool(make_consumer().lanes.with_room)
    assert A not in make_consumer().lanes.with_room


async def test_a_batch_that_left_no_trace_is_tried_again(consumer: FakeConsumer) -> None:
    """The same records, once more and before any others; the partition stays open."""
    role = consumer.role
    role.before[A] += [failing(BatchAborted()), failing(BatchAborted())]
    await consumer.assign(A)

    consumer.feed(A, 2)
    await until(lambda: consumer.delivered)
    consumer.feed(A, 1)
    await until(lambda: len(role.taken[A]) == 3)

    assert [[record.offset for record in batch.records] for batch in consumer.delivered] == [[0, 1]] * 3 + [[2]]
    assert role.story[A] == ["opening", "opened"]


FAULTS = [PartitionFenced(), ServiceUnavailable("away"), RuntimeError("a bug"), OSError(24, "too many"), TimeoutError()]


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: type(fault).__name__)
@pytest.mark.parametrize("moment", ["before", "after", "opening", "closing"])
async def test_after_any_other_failure_the_partition_is_opened_again(
    consumer: FakeConsumer, fault: Exception, moment: str
) -> None:
    """It is closed, opened, and goes on at what was committed: nothing is lost, nothing is taken twice."""
    role = consumer.role
    getattr(role, moment)[A].append(failing(fault))
    if moment == "closing":
        role.before[A].append(failing(RuntimeError("so that it is closed")))
    await consumer.assign(A)

    consumer.feed(A, 3)
    if moment != "opening":
        await until(lambda: consumer.starts[A] == 2 and consumer.lanes.ready)
    consumer.feed(A, 3 if role.committed[A] or moment == "opening" else 6)
    await until(lambda: len(role.taken[A]) == 6)

    assert role.taken[A] == list(range(6))
    first_try = ["opening"] if moment == "opening" else ["opening", "opened"]
    closed = ["closing"] if moment == "closing" else ["closing", "closed"]
    assert role.story[A] == [*first_try, *closed, "opening", "opened"]


async def test_a_partition_that_fails_says_why_and_stops_no_other(consumer: FakeConsumer) -> None:
    """The other goes on at its own pace; the node is not ready."""
    gate = asyncio.Event()
    role = consumer.role
    role.before[A].append(failing(ServiceUnavailable("PostgreSQL does not answer")))
    await consumer.assign(A, B)
    role.opening[A].append(waiting(gate))

    consumer.feed(A, 1)
    await until(lambda: role.story[A][-2:] == ["closed", "opening"])
    for _ in range(5):
        consumer.feed(B, 1)
    await until(lambda: len(role.taken[B]) == 5)

    assert consumer.lanes.status() == {0: "PostgreSQL does not answer", 1: "live"}
    assert not consumer.lanes.ready
    gate.set()
    await until(lambda: consumer.lanes.ready)
    assert consumer.lanes.status() == {0: "live", 1: "live"}


async def test_the_partitions_of_several_topics_are_told_apart() -> None:
    """Those of the main topic by their number alone and first, the others by their topic too, without the prefix."""
    consumer = make_consumer(kafka_topic_prefix="t-")
    consumer.role.main_topic = "t-changelog"  # type: ignore[attr-defined] # what makes it a role of several topics
    lanes = Lanes(consumer.role, consumer, Settings(kafka_topic_prefix="t-"))
    tps = {TP("t-changelog", 1), TP("t-a-letters", 1), TP("t-changelog", 0)}
    for tp in tps:
        consumer.role.opening[tp].append(waiting(asyncio.Event()))
    with capture_logs() as logs:
        lanes.assign(tps)

    assert list(lanes.status().items()) == [(0, "opening"), (1, "opening"), ("a-letters/1", "opening")]
    assert logs[0]["partitions"] == [0, 1, "a-letters/1"]
    await lanes.aclose()


async def test_a_fenced_partition_says_so(consumer: FakeConsumer) -> None:
    """It waits for the group to take it away, and tries again if that does not come."""
    role = consumer.role
    role.before[A].append(failing(PartitionFenced()))
    role.opening[A] += [nothing, waiting(asyncio.Event())]
    await consumer.assign(A)

    consumer.feed(A, 1)
    await until(lambda: role.story[A].count("opening") == 2)

    assert "fenced" in consumer.lanes.status()[0]


async def test_what_was_fetched_for_an_earlier_start_is_dropped(consumer: FakeConsumer) -> None:
    """A closed lane takes nothing, and one that has opened again takes only what was fetched since."""
    role = consumer.role
    gate = asyncio.Event()
    role.opening[A].append(waiting(gate))
    consumer.lanes.assign({A})
    await until(lambda: role.story[A])
    consumer.lanes.offer(A, 0, [FakeRecord(7)])
    consumer.lanes.offer(B, 0, [FakeRecord(7)])
    gate.set()
    await until(lambda: consumer.lanes.ready)
    consumer.lanes.offer(A, consumer.starts[A] - 1, [FakeRecord(7)])

    consumer.feed(A, 1)
    await until(lambda: role.taken[A])

    assert role.taken[A] == [0]


async def test_a_lost_position_opens_the_partition_again(consumer: FakeConsumer) -> None:
    """The batch in flight is finished first; what had been fetched is fetched again; the role finds out the truth."""
    gate = asyncio.Event()
    role = consumer.role
    role.before[A].append(waiting(gate))
    role.opening[A] += [nothing, failing(PositionLost("offsets 2 to 9 are gone"))]
    await consumer.assign(A)
    consumer.feed(A, 2)
    await until(lambda: role.in_flight[A])
    consumer.feed(A, 2)

    consumer.lanes.lose_position(A)
    assert A not in consumer.lanes.with_room
    gate.set()
    await until(lambda: role.story[A].count("opening") == 3 and consumer.lanes.ready)
    consumer.feed(A, 1)
    await until(lambda: len(role.taken[A]) == 3)

    assert role.batches[A] == [[0, 1], [2]]


async def test_an_idle_lane_that_loses_its_position_notices(consumer: FakeConsumer) -> None:
    """It does not wait for records that can never come; a partition that is not ours is none of our business."""
    await consumer.assign(A)
    consumer.lanes.lose_position(B)
    consumer.lanes.lose_position(A)
    await until(lambda: consumer.starts[A] == 2 and consumer.lanes.ready)
    assert consumer.role.story[A] == ["opening", "opened", "closing", "closed", "opening", "opened"]


@pytest.mark.parametrize("seed", range(12))
async def test_nothing_is_lost_or_doubled_whatever_fails(consumer: FakeConsumer, seed: int) -> None:
    """Faults at random moments of two partitions: each record is taken exactly once, in order."""
    draw = random.Random(seed)
    role, lanes = consumer.role, consumer.lanes
    for tp in (A, B):
        role.before[tp] = [draw.choice([nothing, failing(draw.choice([*FAULTS, BatchAborted()]))]) for _ in range(30)]
        role.after[tp] = [draw.choice([nothing, nothing, failing(draw.choice(FAULTS))]) for _ in range(30)]
        role.opening[tp] = [draw.choice([nothing, failing(draw.choice(FAULTS))]) for _ in range(15)]
        role.closing[tp] = [draw.choice([nothing, failing(draw.choice(FAULTS))]) for _ in range(15)]
    lanes.assign({A, B})

    async with asyncio.timeout(20):
        while role.before[A] or role.before[B]:
            for tp in (A, B):
                if tp in lanes.with_room:
                    consumer.feed(tp, draw.randint(1, 2 * RECORDS_MAX))
                    if draw.random() < 0.05:
                        lanes.lose_position(tp)
            await asyncio.sleep(0)

    for tp in (A, B):
        assert role.taken[tp] == list(range(len(role.taken[tp])))
        assert len(role.taken[tp]) > RECORDS_MAX
        assert max(len(batch) for batch in role.batches[tp]) <= RECORDS_MAX


async def test_work_that_is_cancelled_from_inside_is_a_failure_like_others(consumer: FakeConsumer) -> None:
    """A library that cancels a future of its own must not end the lane for ever while it still says `live`."""
    consumer.role.before[A].append(failing(asyncio.CancelledError()))
    await consumer.assign(A)

    consumer.feed(A, 1)
    await until(lambda: consumer.starts[A] == 2 or consumer.lanes._lanes[A]._task.done())

    assert not consumer.lanes._lanes[A]._task.done()


async def test_pauses_are_bounded_after_any_number_of_failures() -> None:
    """After an hour without Kafka a lane still waits a few seconds and tries again."""
    pause = asyncio.create_task(lanes_module._pause(5000))
    await until(pause.done)
    assert pause.exception() is None
