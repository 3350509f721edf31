"""A role and a consumer for tests of lanes: a role that commits like a transaction does, a log that is fed by hand."""

from __future__ import annotations

import asyncio
import copy
from collections import defaultdict
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Iterable, Iterator
from typing import Any, NamedTuple

import pytest
from faust.types import TP
from structlog.testing import capture_logs

from pipeline import lanes as lanes_module
from pipeline.lanes import Batch, Lanes
from pipeline.settings import Settings

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
        #: The changelog partitions that it follows now.
        self.followed: set[TP] = set()
        #: What happened to all partitions together, in order: retained, followed, opening, closed, unfollowed.
        self.order: list[str] = []
        #: Run once each, in order, when it is to follow nothing any more.
        self.unfollowing: list[Step] = []
        self.in_flight: dict[TP, int] = defaultdict(int)
        #: Run once each, in order: before a batch is committed, after it, when opening and when closing.
        self.before: dict[TP, list[Step]] = defaultdict(list)
        self.after: dict[TP, list[Step]] = defaultdict(list)
        self.opening: dict[TP, list[Step]] = defaultdict(list)
        self.closing: dict[TP, list[Step]] = defaultdict(list)

    async def open(self, tp: TP, consumer: Any) -> int:
        """Return the committed position."""
        self.story[tp].append("opening")
        self.order.append("opening")
        await _step(self.opening[tp])
        self.story[tp].append("opened")
        return self.committed[tp]

    async def close(self, tp: TP) -> None:
        """Let go."""
        self.story[tp].append("closing")
        await _step(self.closing[tp])
        self.story[tp].append("closed")
        self.order.append("closed")

    def retain(self, tps: Iterable[TP]) -> None:
        """Note what is kept."""
        self.retained.append(set(tps))
        self.order.append("retained")

    def follow(self, changelogs: Collection[TP]) -> None:
        """Note what is followed."""
        self.followed = set(changelogs)
        self.order.append("followed")

    def copies(self) -> dict[int, str]:
        """Tell of what is followed."""
        return {tp.partition: "following, 3 records behind" for tp in self.followed}

    async def unfollow(self) -> None:
        """Follow nothing."""
        await _step(self.unfollowing)
        self.followed = set()
        self.order.append("unfollowed")

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
        raise copy.copy(error)

    return fail


def waiting(gate: asyncio.Event) -> Step:
    """Make a step that waits."""

    async def wait() -> None:
        await gate.wait()

    return wait


async def nothing() -> None:
    """Be a step that does nothing."""


def make_consumer(**options: Any) -> FakeConsumer:
    """Make lanes with small bounds."""
    bounds: dict[str, Any] = {
        "batch_records_max": RECORDS_MAX,
        "batch_bytes_max": BYTES_MAX,
        "revoke_timeout_ms": 10_000,
    }
    settings = Settings(**(bounds | options))
    # A fenced lane waits for a session; no real one is as short as a test would like.
    return FakeConsumer(settings.model_copy(update={"kafka_session_timeout_ms": 1}))


@pytest.fixture
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Pauses before another try are drawn as always, but from a range that tests can wait for; logs are kept back."""
    monkeypatch.setattr(lanes_module, "_BACKOFF_BASE_SECONDS", 0.0005)
    monkeypatch.setattr(lanes_module, "_BACKOFF_CAP_SECONDS", 0.002)
    with capture_logs():
        yield


@pytest.fixture
async def consumer() -> AsyncIterator[FakeConsumer]:
    """A consumer whose lanes end with the test."""
    consumer = make_consumer()
    yield consumer
    async with asyncio.timeout(20):
        await consumer.lanes.aclose()
