"""Recovery on a real broker: what is restored, what stops it, and nodes whose tables are on disk."""

from __future__ import annotations

import asyncio
import json
import resource
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from aiokafka import AIOKafkaProducer
from faust.types import TP
from structlog.testing import capture_logs

from agents import reducer
from pipeline.bench.recovery import DIFFERENCE_RECORDS, RecoveryPlan, run_recovery
from pipeline.errors import RecoveryFailed
from pipeline.events import PROGRESS_KEY, Change, Progress, encode_record
from pipeline.kafka import kafka_options
from pipeline.logreader import LogReader
from pipeline.records import Record
from pipeline.settings import Settings
from pipeline.topics import FILES_CHANGELOG, admin_client, create_topics, has_transactions, topic_name
from pipeline.transactions import Writer
from pipeline.verify import all_faults, verify
from tables.changelog import restore
from tables.rocks import RocksFolder
from tables.store import MemoryStore, OpenStore, PartitionStore, open_in_memory
from tests.fix_road import NodeProcess, Road, make_events

pytestmark = pytest.mark.integration

NOON = datetime(2026, 11, 23, 12, tzinfo=UTC)
PARTITION = 1


def make_value(input_offset: int) -> bytes:
    """Make the value of a change that leaves no state."""
    return encode_record(Change(outcome="rejected", input_offset=input_offset, recorded_at=NOON, state=None))


@dataclass
class Changelog:
    """A changelog on a real broker, and what a store must hold of it."""

    settings: Settings
    topic: str
    writer: Writer
    values: dict[bytes, bytes] = field(default_factory=dict)
    inputs: int = 0
    #: The offset after the last record that was written.
    end: int = 0

    @property
    def progress(self) -> Progress:
        """The last progress that was written."""
        return Progress(next_input_offset=self.inputs, outcomes={"rejected": self.inputs})

    async def write(self, keys: Sequence[bytes]) -> None:
        """Write one batch as the reducer does: its changes, and its progress."""
        batch = {}
        for key in keys:
            batch[key] = make_value(self.inputs)
            self.inputs += 1
        await self.write_raw(*(Record(*item) for item in batch.items()), self.make_progress_record())
        self.values |= batch

    def make_progress_record(self) -> Record:
        """Make the record of the progress so far."""
        return Record(PROGRESS_KEY, encode_record(self.progress))

    async def write_raw(self, *records: Record) -> None:
        """Write any records, in one transaction where the broker has them."""
        ends = await self.writer.write(
            {self.topic: records}, {TP(f"{self.settings.kafka_topic_prefix}file-stamps", 0): 0}
        )
        self.end = ends[self.topic]

    async def restore(self, store: PartitionStore) -> int:
        """Restore it into a store, once all of it is there: Kafka confirms a commit before its markers are written.

        A node need not wait for that, for fencing the writer before it does.
        """
        end = -1
        async with asyncio.timeout(20):
            while end < self.end:
                async with LogReader(self.settings, self.topic, PARTITION) as reader:
                    end = await reader.find_end()
        return await restore(self.settings, self.topic, PARTITION, store)

    def assert_in(self, store: PartitionStore) -> None:
        """The store holds all that was written and committed."""
        assert dict(store.items()) == self.values
        assert store.progress == self.progress


@asynccontextmanager
async def run_changelog(settings: Settings) -> AsyncIterator[Changelog]:
    """Make the topics and a writer for one partition of the changelog."""
    await create_topics(settings)
    transactions = await has_transactions(settings)

    async def commit_nothing(_offsets: Any) -> None: ...

    writer = Writer(
        settings,
        partition=PARTITION,
        group=f"{settings.kafka_topic_prefix}group",
        transactional_id=f"{settings.kafka_topic_prefix}writer" if transactions else None,
        idempotent=transactions,
        commit_offsets=commit_nothing,
    )
    await writer.open()
    try:
        yield Changelog(settings, topic_name(settings, FILES_CHANGELOG), writer)
    finally:
        await writer.aclose()


@pytest.fixture
async def changelog(settings: Settings) -> AsyncIterator[Changelog]:
    """A changelog with nothing in it."""
    async with run_changelog(settings) as changelog:
        yield changelog


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[RocksFolder]:
    """A folder for stores on disk."""
    with RocksFolder(tmp_path / "tables") as folder:
        yield folder


@pytest.fixture(params=["memory", "rocksdb"])
def open_store(request: pytest.FixtureRequest, folder: RocksFolder) -> OpenStore:
    """How a store of each kind is opened."""
    return open_in_memory if request.param == "memory" else folder.open


@pytest.fixture
def store(open_store: OpenStore, changelog: Changelog) -> Iterator[PartitionStore]:
    """A store for that changelog that has seen nothing yet."""
    store = open_store("files", changelog.topic, PARTITION)
    yield store
    store.close()


def keys(count: int, first: int = 0) -> list[bytes]:
    """Make some keys."""
    return [b"file:///%d" % number for number in range(first, first + count)]


async def test_a_restore_reads_to_the_end_and_the_next_one_only_what_is_new(
    changelog: Changelog, store: PartitionStore
) -> None:
    """In pieces, with how far it has come after each; the markers at the end are passed too."""
    told: list[tuple[int, int]] = []
    for first in range(0, 9000, 1500):
        await changelog.write(keys(1500, first))

    count = await restore(changelog.settings, changelog.topic, PARTITION, store, report=lambda *pair: told.append(pair))

    changelog.assert_in(store)
    assert count == told[-1][0] == 9006
    assert [read for read, _ in told] == sorted({read for read, _ in told})
    assert [left for _, left in told] == sorted({left for _, left in told}, reverse=True)
    assert len(told) > 1
    assert await changelog.restore(store) == 0
    await changelog.write(keys(10))
    assert await changelog.restore(store) == 11
    changelog.assert_in(store)


async def test_tombstones_take_keys_away(changelog: Changelog, store: PartitionStore) -> None:
    """A key whose last record is a tombstone is not there; one that came back is."""
    await changelog.write([b"a", b"b"])
    await changelog.write_raw(Record(b"a", None), Record(b"b", None), Record(b"b", make_value(9)))
    await changelog.restore(store)

    assert dict(store.items()) == {b"b": make_value(9)}


async def test_what_was_aborted_is_not_restored(changelog: Changelog, store: PartitionStore) -> None:
    """A transaction without a commit leaves no trace, neither in the middle nor at the end, and does not hold up."""
    if not await has_transactions(changelog.settings):
        pytest.skip("the embedded broker has no transactions to abort")
    producer = AIOKafkaProducer(**kafka_options(changelog.settings), transactional_id=f"{changelog.topic}-aborting")
    await producer.start()
    try:
        for first in (0, 100):
            await changelog.write(keys(100, first))
            await producer.begin_transaction()
            await producer.send_and_wait(changelog.topic, b"not utf-8 \xff", b"garbage", partition=PARTITION)
            await producer.abort_transaction()
    finally:
        await producer.stop()

    count = await changelog.restore(store)

    changelog.assert_in(store)
    assert count == 202
    assert await changelog.restore(store) == 0


#: A record without a key is not among them: a broker takes none into a compacted topic.
POISON = {
    "garbage": Record(b"file:///a", b"\xff garbage"),
    "nothing": Record(b"file:///a", b""),
    "of another kind": Record(b"file:///a", encode_record(Progress(next_input_offset=1, outcomes={}))),
    "a key of our own": Record(b"\x00store", make_value(7)),
    "no progress": Record(PROGRESS_KEY, b"\xff"),
    "a tombstone of the progress": Record(PROGRESS_KEY, None),
}


@pytest.mark.parametrize("record", POISON.values(), ids=POISON)
async def test_a_poisoned_changelog_stops_where_it_is_and_is_named(
    changelog: Changelog, store: PartitionStore, record: Record
) -> None:
    """Topic, partition, offset and what to do; the store stays at the last good piece, also when it is tried again."""
    await changelog.write(keys(5))
    await changelog.restore(store)
    values, progress, position = dict(store.items()), store.progress, store.position
    await changelog.write_raw(Record(b"file:///before", make_value(5)), record, Record(b"file:///after", make_value(6)))
    await changelog.write(keys(5))

    for _ in range(2):
        with pytest.raises(RecoveryFailed) as caught:
            await changelog.restore(store)

        assert f"{changelog.topic} partition {PARTITION} offset {position + 1} is no " in str(caught.value)
        assert "newer version" in str(caught.value)
        assert (dict(store.items()), store.progress, store.position) == (values, progress, position)


async def test_what_is_on_disk_is_not_read_again(changelog: Changelog, folder: RocksFolder) -> None:
    """A restart restores the difference, to the record."""
    await changelog.write(keys(3000))
    store = folder.open("files", changelog.topic, PARTITION)
    await changelog.restore(store)
    store.close()
    await changelog.write(keys(700, 2900))

    store = folder.open("files", changelog.topic, PARTITION)

    assert await changelog.restore(store) == 701
    changelog.assert_in(store)
    memory = MemoryStore()
    await changelog.restore(memory)
    assert dict(memory.items()) == dict(store.items())
    assert (memory.progress, memory.position, memory.mark) == (store.progress, store.position, store.mark)
    store.close()


async def _make_topics_anew(settings: Settings) -> None:
    topic = topic_name(settings, FILES_CHANGELOG)
    async with admin_client(settings) as client:
        await client.delete_topics([topic])
        while topic in await client.list_topics():
            pass
    await create_topics(settings)


@pytest.mark.parametrize(
    ("batches", "why"),
    [
        ([], "is empty, but was read up to"),
        ([5], "ends at .*, but was read up to"),
        ([7, 30, 30], "is not the record that was read there"),
    ],
    ids=["empty", "shorter", "longer"],
)
async def test_another_changelog_by_the_same_name_is_refused(
    settings: Settings, open_store: OpenStore, batches: list[int], why: str
) -> None:
    """Shorter or longer than what the store has seen: it is not mixed, and the message says what to delete."""
    async with run_changelog(settings) as changelog:
        await changelog.write(keys(20))
        await changelog.write(keys(20))
        store = open_store("files", changelog.topic, PARTITION)
        await changelog.restore(store)
    values, position = dict(store.items()), store.position
    await _make_topics_anew(settings)
    async with run_changelog(settings) as changelog:
        for count in batches:
            await changelog.write(keys(count, 50))

        with pytest.raises(RecoveryFailed, match=why) as caught:
            await changelog.restore(store)

    remedy = r"delete .*tables/files/1, the changelog restores it" if store.on_disk else "restart this node"
    caught.match(remedy)
    assert (dict(store.items()), store.position) == (values, position)
    store.close()


class FakeConsumer:
    """As much of the consumer as a recovery needs: it keeps what a lane was told."""

    def __init__(self) -> None:
        self.told: list[tuple[TP, str]] = []
        self.lanes = self

    def report(self, tp: TP, status: str) -> None:
        """Keep it."""
        self.told.append((tp, status))


async def test_a_lane_is_told_how_much_is_left(changelog: Changelog, monkeypatch: pytest.MonkeyPatch) -> None:
    """The status of a partition that recovers counts down, and so does the log of one that takes long."""
    monkeypatch.setattr(reducer, "_REPORT_SECONDS", 0.0)
    await changelog.write(keys(6000))
    role = reducer.Reducer(changelog.settings, transactions=True)
    consumer, tp = FakeConsumer(), TP("file-stamps", PARTITION)

    with capture_logs() as logs:
        await role._recover(tp, MemoryStore(), consumer)  # type: ignore[arg-type] # see its docstring

    assert {told for told, _ in consumer.told} == {tp}
    left = [int(status.split()[1]) for _, status in consumer.told]
    assert [status for _, status in consumer.told] == [f"recovering: {number} records left" for number in left]
    assert left == sorted(left, reverse=True)
    assert left[-1] <= 1, "but for the marker nothing is left in the end"
    told = [(line["records"], line["remaining"]) for line in logs if line["event"] == "partition_recovering"]
    assert [remaining for _, remaining in told] == left
    assert told[-1][0] == logs[-1]["records"] == 6001
    assert logs[-1]["event"] == "partition_recovered"


def recovered(node: NodeProcess) -> list[dict[str, Any]]:
    """Return what a node has logged of its recoveries."""
    lines = [json.loads(line) for line in node.log.read_text().splitlines() if line.startswith("{")]
    return [line for line in lines if line["event"] == "partition_recovered"]


async def test_a_node_that_is_killed_restores_only_the_difference(road: Road, tmp_path: Path) -> None:
    """SIGKILL in the middle of the flow, and again: the result is exact, and the files on disk are used."""
    on_disk = {"TABLE_STORE": "rocksdb", "TABLE_DIR": str(tmp_path / "tables")}
    for role in ("hasher", "projector"):
        road.start(role)
    events = make_events(30_000, 3_000, seed=21)
    node = road.start("reducer", **on_disk)
    positions = await road.send(events[:10_000])
    await road.until_visible(positions)
    for start in (10_000, 20_000):
        positions += await road.send(events[start : start + 10_000])
        node.kill()
        node = road.start("reducer", **on_disk)
        await road.until_visible(positions)

        # All would be one record for each of more than 10,000 inputs, and one for each batch; mostly it is none.
        assert len(recovered(node)) == 4
        assert sum(line["records"] for line in recovered(node)) < 10_000
        assert sum(line["keys"] for line in recovered(node)) > 2_000

    await road.assert_exact(events, positions)
    assert all_faults(await verify(road.settings)) == []
    assert node.terminate() == 0


async def test_a_second_process_in_the_same_folder_does_not_start(road: Road, tmp_path: Path) -> None:
    """It ends with one line that says what to do, and the first one does not notice."""
    on_disk = {"TABLE_STORE": "rocksdb", "TABLE_DIR": str(tmp_path / "tables")}
    first = road.start("reducer", **on_disk)
    await road.until(partial(first.has_logged, '"node_started"'))

    second = road.start("reducer", **on_disk)
    code = second.process.wait(60)
    road.nodes.remove(second)

    assert code == 1
    assert [line for line in second.log.read_text().splitlines() if not line.startswith("{")] == [
        f"stampline: TABLE_DIR: {tmp_path}/tables is used by another process: give each process a folder of its own"
    ]
    assert first.terminate() == 0


async def test_a_full_disk_stops_partitions_until_there_is_room(road: Road, tmp_path: Path) -> None:
    """The Kafka transaction is committed, the store cannot follow: it is told, and made good from the changelog."""
    for role in ("hasher", "projector"):
        road.start(role)
    node = road.start("reducer", TABLE_STORE="rocksdb", TABLE_DIR=str(tmp_path / "tables"), LOG_LEVEL="WARNING")
    before = make_events(200, 100, seed=22)
    positions = await road.send(before)
    await road.until_visible(positions)
    pid = node.process.pid
    _, most = resource.prlimit(pid, resource.RLIMIT_FSIZE)
    # No file of this process may grow beyond: to RocksDB it is a disk without room.
    resource.prlimit(pid, resource.RLIMIT_FSIZE, (400_000, most))
    events = make_events(20_000, 5_000, seed=23)
    positions += await road.send(events)
    await road.until(partial(node.has_logged, "is the disk full?"))

    resource.prlimit(pid, resource.RLIMIT_FSIZE, (most, most))
    await road.until_visible(positions)

    await road.assert_exact(before + events, positions)
    assert all_faults(await verify(road.settings)) == []
    assert node.terminate() == 0


async def test_the_bench_restores_what_it_wrote(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each way is measured in a process of its own, and every record and key is counted."""
    if not await has_transactions(settings):
        pytest.skip("the bench writes transactions, which the embedded broker does not have")
    monkeypatch.setenv("KAFKA_BOOTSTRAP_SERVERS", settings.kafka_bootstrap_servers)

    report = await run_recovery(RecoveryPlan((16_000,)), lambda _line: None)

    everything, difference = 16_008, DIFFERENCE_RECORDS + 8
    assert [(found.store, found.what, found.keys, found.records) for found in report.recoveries] == [
        ("memory", "all", 16_000, everything),
        ("rocksdb", "all", 16_000, everything),
        ("rocksdb", "the rest", 16_000, difference),
    ]
    assert [found.disk_bytes_per_key is not None for found in report.recoveries] == [False, True, True]
    assert all(found.seconds > 0 and found.memory_bytes > 0 for found in report.recoveries)
    assert 200 < report.value_bytes < 300
