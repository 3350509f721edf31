"""What the reducer counts of its batches, and what it writes for an event that is to come again."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any, cast

import pytest
from aiokafka.structs import ConsumerRecord
from faust.types import TP

from agents import reducer as reducer_module
from agents.reducer import Reducer
from agents.retry import DUE_HEADER
from pipeline.errors import ServiceUnavailable
from pipeline.events import ATTEMPT_HEADER, Stamp, encode_record
from pipeline.lanes import Batch
from pipeline.metrics import Metrics
from pipeline.records import Record
from pipeline.transactions import Writer
from tables.files import Rules, backoff_ms, fold
from tables.store import MemoryStore
from tests.fix_services import make_settings_for

pytestmark = pytest.mark.unit

NOON = datetime(2026, 11, 23, 12, tzinfo=UTC)
NOON_MS = int(NOON.timestamp() * 1000)
TOPIC = TP("file-stamps", 0)
CHANGELOG = "stampline-reducer-files-changelog"


def make_stamp(input_offset: int, **fields: Any) -> Stamp:
    """Make the stamp of the input at an offset; the one before it is at the offset before."""
    defaults: dict[str, Any] = {
        "previous_offset": input_offset - 1 if input_offset else None,
        "uri": "file:///a",
        "event_id": f"event-{input_offset}",
        "op": "modified",
        "namespace": "default",
        "occurred_at": NOON,
        "recorded_at": NOON,
        "stamped_at": NOON,
        "digest": bytes([input_offset % 251]) * 32,
        "size": input_offset,
        "original": b"as it came",
    }
    return Stamp(input_offset=input_offset, **(defaults | fields))


class FakeWriter:
    """Keeps what is written, or refuses it."""

    def __init__(self) -> None:
        self.written: list[Mapping[str, Sequence[Record]]] = []
        self.refuses = False

    async def write(self, outputs: Mapping[str, Sequence[Record]], offsets: Mapping[TP, int]) -> dict[str, int]:
        """Return the offset after what was written to the changelog."""
        if self.refuses:
            raise ServiceUnavailable("transaction aborted")
        self.written.append(outputs)
        return {CHANGELOG: sum(len(written[CHANGELOG]) for written in self.written)}


class Ground:
    """A reducer with one open partition, and its counters."""

    def __init__(self) -> None:
        self.metrics = Metrics()
        self.writer = FakeWriter()
        self.reducer = Reducer(make_settings_for(retry_max_attempts=2), transactions=True, metrics=self.metrics)
        partition = reducer_module._Partition(cast("Writer", self.writer), MemoryStore())
        self.reducer._partitions[TOPIC] = partition

    async def reduce(self, *stamps: Stamp) -> None:
        """Let the reducer process one batch."""
        records = [
            ConsumerRecord(*TOPIC, offset, NOON_MS, 0, None, encode_record(stamp), None, 0, 0, ())
            for offset, stamp in enumerate(stamps)
        ]
        await self.reducer.process(Batch(TOPIC, records))

    def counted(self) -> dict[str, float]:
        """Return every counter that is not zero, and how much each histogram has."""
        return {
            sample.name + "".join(f"{{{label}}}" for label in sample.labels.values()): sample.value
            for family in self.metrics.collect()
            for sample in family.samples
            if sample.value and not sample.name.endswith(("_bucket", "_sum", "_info"))
        }


@pytest.fixture
async def ground() -> Ground:
    """A reducer that has seen nothing yet."""
    return Ground()


KNOWN_BATCH = (
    make_stamp(0),
    make_stamp(1, digest=bytes(32)),  # the same content
    make_stamp(2, event_id="event-0"),  # seen before
    make_stamp(3, expected_version=0),  # in the past
    make_stamp(4, expected_version=5),  # in the future
    make_stamp(5, expected_version=5, attempt=1),
    make_stamp(6, expected_version=5, attempt=2),  # for the last time
    make_stamp(7, expected_version=1),
    make_stamp(8, uri=None, event_id=None, reason="undecodable"),
    make_stamp(8),  # a repeat
    make_stamp(10, previous_offset=7),  # a stray
)


async def test_a_known_batch_is_counted(ground: Ground) -> None:
    """Each input by its outcome, once; repeats and strays are no inputs."""
    await ground.reduce(*KNOWN_BATCH)

    assert ground.counted() == {
        "reducer_outcomes_total{committed}": 2,
        "reducer_outcomes_total{unchanged}": 1,
        "reducer_outcomes_total{duplicate}": 1,
        "reducer_outcomes_total{conflict}": 1,
        "reducer_outcomes_total{deferred}": 2,
        "reducer_outcomes_total{gave_up}": 1,
        "reducer_outcomes_total{rejected}": 1,
        "reducer_successful_actions_total": 3,
        "reducer_conflict_attempts_total": 4,
        "reducer_gave_up_total": 1,
        "canonical_store_state_commits_total": 2,
        "canonical_store_state_conflicts_total": 1,
        "action_dedup_checks_total": 8,
        "action_dedup_hits_total": 1,
        "dead_letters_total{gave_up}": 1,
        "reducer_backoff_ms_count": 2,
        "canonical_store_commit_latency_ms_count": 1,
        "batch_size_records_count": 1,
        "batch_duration_seconds_count{reducer}": 1,
    }


async def test_the_next_batch_is_added(ground: Ground) -> None:
    """What the partition's progress has counted before does not count again."""
    await ground.reduce(make_stamp(0), make_stamp(1))
    await ground.reduce(make_stamp(2))
    counted = ground.counted()

    assert counted["reducer_outcomes_total{committed}"] == 3
    assert counted["canonical_store_commit_latency_ms_count"] == 2


async def test_an_aborted_batch_is_not_counted(ground: Ground) -> None:
    """Nothing of it: it comes again."""
    ground.writer.refuses = True
    with pytest.raises(ServiceUnavailable):
        await ground.reduce(*KNOWN_BATCH)

    assert ground.counted() == {}


async def test_a_deferred_event_says_when_it_is_due(ground: Ground) -> None:
    """In its own bytes, with the attempt that comes next, and the pause after it was stamped."""
    stamp = make_stamp(0, expected_version=5, attempt=1)
    await ground.reduce(stamp)
    [[record]] = [written["file-events-retry"] for written in ground.writer.written]
    pause_ms = backoff_ms("event-0", 2, Rules())

    assert record == (
        b"file:///a",
        b"as it came",
        ((ATTEMPT_HEADER, b"2"), (DUE_HEADER, b"%d" % (NOON_MS + pause_ms))),
    )


async def test_counting_costs_nothing_per_event(ground: Ground) -> None:
    """A batch of 8000 is counted in less than a hundredth of the time that its fold takes."""
    stamps = [make_stamp(offset, uri=f"file:///{offset % 500}") for offset in range(8000)]
    started = time.perf_counter()
    folded = fold(stamps, MemoryStore().get, None, Rules())
    folding = time.perf_counter() - started
    counting = []
    for _ in range(5):
        started = time.perf_counter()
        ground.reducer._count(folded, None, ())
        counting.append(time.perf_counter() - started)

    assert min(counting) < folding / 100
