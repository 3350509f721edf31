"""Lanes: one batch in flight per partition, in order, and nothing lost or doubled whatever goes wrong.

The role and the consumer are fakes: a role that commits like a transaction does, and a log that is fed by hand.
"""

from __future__ import annotations

import asyncio
import random
from collections import defaultdict
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from typing import Any, NamedTuple

import pytest
from faust.types import TP

from pipeline import lanes as lanes_module
from pipeline.errors import BatchAborted, PartitionFenced, PositionLost, ServiceUnavailable
from pipeline.lanes import Batch, Lanes
from pipeline.settings import Settings

pytestmark = pytest.mark.unit

A, B = TP("file-events", 0), TP("file-events", 1)
RECORDS_MAX = 5
BYTES_MAX = 2**20


class FakeRecord(NamedTuple):
    """As much of a record as a lane looks at."""

    offset: int
    key: bytes | None = None
    value: bytes | None = None


Step = Callable[[], Awaitable[None]]


class FakeRole:
    """Takes records exactly as a transaction does: all of a batch at its end, with the position, or nothing."""

    def __init__(self) -> None:
        self.committed: dict[TP, int] = defaultdict(int)
        self.taken: dict[TP, list[int]] = defaultdict(list)
        self.batches: dict[TP, list[list[int]]] = defaultdict(list)
        #: What happened, in order: opening, opened, closing, closed, cancelled.
        self.story: dict[TP, list[str]] = defaultdict(list)
        self.retained: list[set[TP]] = []
        self.in_flight: dict[TP, int] = defaultdict(int)
        #: Run once each, in order: before a batch is committed, after it, when opening and when closing.
        self.before: dict[TP, list[Step]] = defaultdict(list)
        self.after: dict[TP, list[Step]] = defaultdict(list)
        self.opening: dict[TP, list[Step]] = defaultdict(list)
        self.closing: dict[TP, list[Step]] = defaultdict(list)

    async def open(self, tp: TP, consumer: Any) -> int:
        """Return the committed position."""
        self.story[tp].append("opening")
        await _step(self.opening[tp])
        self.story[tp].append("opened")
        return self.committed[tp]

    async def close(self, tp: TP) -> None:
        """Let go."""
        self.story[tp].append("closing")
        await _step(self.closing[tp])
        self.story[tp].append("closed")

    def retain(self, tps: Iterable[TP]) -> None:
        """Note what is kept."""
        self.retained.append(set(tps))

    async def process(self, batch: Batch) -> None:
        """Take a batch."""
        tp = batch.tp
        self.in_flight[tp] += 1
        try:
            assert self.in_flight[tp] == 1, "two batches of one partition are in flight"
            await _step(self.before[tp])
            self.batches[tp].append([record.offset for record in batch.records])
            self.taken[tp] += self.batches[tp][-1]
            self.committed[tp] = batch.next_offset
            await _step(self.after[tp])
        except asyncio.CancelledError:
            self.story[tp].append("cancelled")
            raise
        finally:
            self.in_flight[tp] -= 1


async def _step(steps: list[Step]) -> None:
    if steps:
        await steps.pop(0)()


class FakeConsumer:
    """A log without end, of which a test hands out as many records as it likes; agents are always there."""

    def __init__(self, settings: Settings) -> None:
        self.role = FakeRole()
        self.lanes = Lanes(self.role, self, settings)
        self.positions: dict[TP, int] = {}
        self.starts: dict[TP, int] = defaultdict(int)
        self.delivered: list[Batch] = []
        self.wakes = 0

    @property
    def thread(self) -> FakeConsumer:
        """The thread, which has nothing to do but to wake up."""
        return self

    def wake(self) -> None:
        """Note that room was told of."""
        self.wakes += 1

    async def deliver(self, batch: Batch) -> None:
        """Do what an agent does."""
        self.delivered.append(batch)
        batch.start(self.role.process)

    async def start_at(self, tp: TP, offset: int) -> int:
        """Seek."""
        self.positions[tp] = offset
        self.starts[tp] += 1
        return self.starts[tp]

    def feed(self, tp: TP, count: int, value: bytes | None = None) -> None:
        """Fetch the next records and offer them."""
        position = self.positions[tp]
        self.positions[tp] += count
        records = [FakeRecord(offset, b"k", value) for offset in range(position, position + count)]
        self.lanes.offer(tp, self.starts[tp], records)

    async def assign(self, *tps: TP) -> None:
        """Assign partitions and wait until they are open."""
        self.lanes.assign(set(tps))
        await until(lambda: self.lanes.ready)


async def until(condition: Callable[[], object]) -> None:
    """Let everything else run until the condition holds."""
    async with asyncio.timeout(20):
        while not condition():  # noqa: ASYNC110 (what happens inside a lane has no event of its own)
            await asyncio.sleep(0)


def failing(error: BaseException) -> Step:
    """Make a step that raises."""

    async def fail() -> None:
        raise error

    return fail


def make_consumer(**options: Any) -> FakeConsumer:
    """Make lanes with small bounds."""
    bounds: dict[str, Any] = {
        "batch_records_max": RECORDS_MAX,
        "batch_bytes_max": BYTES_MAX,
        "revoke_timeout_ms": 10_000,
    }
    return FakeConsumer(Settings(**(bounds | options)))


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pauses before another try are drawn as always, but from a range that tests can wait for."""
    monkeypatch.setattr(lanes_module, "_BACKOFF_BASE_SECONDS", 0.0005)
    monkeypatch.setattr(lanes_module, "_BACKOFF_CAP_SECONDS", 0.002)


@pytest.fixture
async def consumer() -> AsyncIterator[FakeConsumer]:
    """A consumer whose lanes end with the test."""
    consumer = make_consumer()
    yield consumer
    async with asyncio.timeout(20):
        await consumer.lanes.aclose()


async def test_records_gather_while_a_batch_is_in_flight(consumer: FakeConsumer) -> None:
    """One batch at a time, in order; what came meanwhile is the next one, as a whole."""
    gate = asyncio.Event()
    role = consumer.role
    role.before[A].append(gate.wait)  # type: ignore[arg-type] # what it returns is of no interest
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
    role.before[A].append(gate.wait)  # type: ignore[arg-type] # what it returns is of no interest
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
    consumer.role.before[A].append(gate.wait)  # type: ignore[arg-type] # what it returns is of no interest
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
    """To aiokafka an empty collection means all partitions; the view of those with room is never empty in that sense."""
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
    role.opening[A].append(gate.wait)  # type: ignore[arg-type] # what it returns is of no interest

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


async def test_a_fenced_partition_says_so(consumer: FakeConsumer) -> None:
    """It waits for the group to take it away, and tries again if that does not come."""
    role = consumer.role
    role.before[A] += [failing(PartitionFenced())]
    role.opening[A] += [asyncio.Event().wait] * 2  # type: ignore[list-item] # what it returns is of no interest
    role.opening[A].pop(0)
    consumer.lanes.assign({A})
    role.opening[A].insert(0, asyncio.sleep_zero if hasattr(asyncio, "sleep_zero") else _nothing)
    await until(lambda: consumer.lanes.ready)

    consumer.feed(A, 1)
    await until(lambda: role.story[A].count("opening") == 2)

    assert "fenced" in consumer.lanes.status()[0]


async def _nothing() -> None:
    pass


async def test_what_was_fetched_for_an_earlier_start_is_dropped(consumer: FakeConsumer) -> None:
    """A closed lane takes nothing, and one that has opened again takes only what was fetched since."""
    role = consumer.role
    gate = asyncio.Event()
    role.opening[A].append(gate.wait)  # type: ignore[arg-type] # what it returns is of no interest
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
    role.before[A].append(gate.wait)  # type: ignore[arg-type] # what it returns is of no interest
    role.opening[A] += [_nothing, failing(PositionLost("offsets 2 to 9 are gone"))]
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
    role = consumer.role
    kinds = [*FAULTS, BatchAborted()]
    for tp in (A, B):
        role.before[tp] = [draw.choice([_nothing, failing(draw.choice(kinds))]) for _ in range(40)]
        role.after[tp] = [draw.choice([_nothing, _nothing, failing(draw.choice(FAULTS))]) for _ in range(40)]
        role.opening[tp] = [draw.choice([_nothing, failing(draw.choice(FAULTS))]) for _ in range(20)]
        role.closing[tp] = [draw.choice([_nothing, failing(draw.choice(FAULTS))]) for _ in range(20)]
    consumer.lanes.assign({A, B})

    async with asyncio.timeout(20):
        while min(len(role.taken[tp]) for tp in (A, B)) < 60:
            for tp in (A, B):
                if tp in consumer.lanes.with_room:
                    consumer.feed(tp, draw.randint(1, 2 * RECORDS_MAX))
                if draw.random() < 0.01:
                    consumer.lanes.lose_position(tp)
            await asyncio.sleep(0)

    for tp in (A, B):
        assert role.taken[tp] == list(range(len(role.taken[tp])))
    assert max(len(batch) for tp in (A, B) for batch in role.batches[tp]) <= RECORDS_MAX
