"""Two reducers believe that they own one partition: only the one that opened it last can write anything.

Real Kafka, and reducers as a node makes them, each over an app of its own that is not started; of the consumer they get
as much as they ask for. Zombies among hashers leave strays, which tests/unit/tables/test_files.py has the laws of;
zombies among projectors lose the compare-and-set, see test_projection_writer.py.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack
from datetime import UTC, datetime
from typing import Any, cast

import pytest
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer, TopicPartition
from faust.types import TP

from agents import reducer
from agents.reducer import Reducer
from pipeline.app import RoleApp
from pipeline.errors import PartitionFenced
from pipeline.events import PROGRESS_KEY, Stamp, decode_change, decode_progress, encode_record
from pipeline.lanes import Batch
from pipeline.logreader import LogReader
from pipeline.settings import Settings
from pipeline.topics import FILE_STAMPS, FILES_CHANGELOG, create_topics, topic_name
from pipeline.transport import LogRange
from pipeline.worker import run_node
from tables.store import BatchTable
from tests.fix_services import MakeSettings
from tests.lane_fakes import until

pytestmark = pytest.mark.integration


class Place:
    """As much of a consumer as a reducer asks for: what the log holds, and what the group has committed."""

    def __init__(self, settings: Settings, client: AIOKafkaConsumer) -> None:
        self._settings = settings
        self._client = client
        self.lanes = self

    def report(self, tp: TP, status: str) -> None:
        """Take note of nothing."""

    async def log_range(self, tp: TP) -> LogRange:
        """Ask the broker."""
        place = TopicPartition(*tp)
        begin = (await self._client.beginning_offsets([place]))[place]
        end = (await self._client.end_offsets([place]))[place]
        return LogRange(begin, end, await self._client.committed(place))

    async def commit_offsets(self, offsets: Mapping[TP, int]) -> None:
        """Never called: a reducer commits in its transaction."""
        raise AssertionError


class Contender:
    """A reducer that may or may not be the owner of a partition."""

    def __init__(self, app: RoleApp, place: Place) -> None:
        self.app = app
        self.place = place
        self.reducer = cast("Reducer", app.role)

    async def open(self, tp: TP) -> int:
        """Take the partition over."""
        return await self.reducer.open(tp, cast("Any", self.place))

    async def process(self, tp: TP, records: list[Any]) -> None:
        """Process a batch."""
        await self.reducer.process(Batch(tp, records))

    def versions(self) -> dict[str, int]:
        """What its table says."""
        table = cast("BatchTable", self.app.tables["files"])
        return {key: value["version"] for key, value in table.batch_store.items()}


class Arena:
    """Partitions with stamps in them, and whoever fights for them."""

    def __init__(self, settings: Settings, stack: AsyncExitStack, client: AIOKafkaConsumer) -> None:
        self.settings = settings
        self._stack = stack
        self._client = client

    def tp(self, partition: int = 0) -> TP:
        """A partition of the reducer's input."""
        return TP(topic_name(self.settings, FILE_STAMPS), partition)

    def enter(self) -> Contender:
        """Make a reducer."""
        app = reducer.create_app(self.settings, transactions=True)
        self._stack.callback(app.release)
        contender = Contender(app, Place(self.settings, self._client))
        self._stack.push_async_callback(contender.reducer.close, self.tp())
        return contender

    async def write_stamps(self, *names: str, first: int = 0, partition: int = 0) -> list[Any]:
        """Write a stamp for each name, as a hasher does, and return the records as a consumer gets them."""
        producer = AIOKafkaProducer(bootstrap_servers=self.settings.kafka_bootstrap_servers)
        await producer.start()
        try:
            for offset, name in enumerate(names, first):
                value = encode_record(make_stamp(name, offset))
                await producer.send_and_wait(self.tp().topic, key=name.encode(), value=value, partition=partition)
        finally:
            await producer.stop()
        return (await self.read(FILE_STAMPS, partition=partition))[-len(names) :]

    async def read(self, name: str, partition: int = 0, *, aborted: bool = False) -> list[Any]:
        """Return all committed records of a topic, or all that were ever sent to it."""
        reader = LogReader(self.settings, topic_name(self.settings, name), partition)
        if aborted:
            reader._consumer._isolation_level = "read_uncommitted"
        async with reader:
            return [record async for records in reader.read(0) for record in records]

    async def taken(self, partition: int = 0) -> list[int]:
        """The input offsets that the changelog tells of."""
        records = await self.read(FILES_CHANGELOG, partition)
        return [decode_change(record.value).input_offset for record in records if record.key != PROGRESS_KEY]

    async def progress(self, *, aborted: bool = False) -> list[int]:
        """The next input offset after each batch that the changelog tells of: a name for the batch."""
        records = await self.read(FILES_CHANGELOG, aborted=aborted)
        return [decode_progress(record.value).next_input_offset for record in records if record.key == PROGRESS_KEY]

    async def committed(self, partition: int = 0) -> int | None:
        """The input offset that the group has committed."""
        return (await Place(self.settings, self._client).log_range(self.tp(partition))).committed

    async def until_taken(self, offset: int, partition: int = 0) -> None:
        """Wait until an input is in the changelog: the markers of a transaction come after the answer to its commit."""
        async with asyncio.timeout(60):
            while offset not in await self.taken(partition):
                pass  # Asking takes its time.

    async def until_committed(self, partition: int, offset: int) -> None:
        """Wait for a commit."""
        async with asyncio.timeout(60):
            while await self.committed(partition) != offset:
                pass  # Asking takes its time.


def make_stamp(name: str, offset: int) -> Stamp:
    """Make the stamp of the input at `offset`, with content of its own."""
    now = datetime.now(UTC)
    return Stamp(
        input_offset=offset,
        previous_offset=offset - 1 if offset else None,
        uri=name,
        event_id=f"{name}-{offset}",
        op="modified",
        namespace="default",
        occurred_at=now,
        recorded_at=now,
        stamped_at=now,
        digest=offset.to_bytes(32, "big"),
        size=1,
    )


@pytest.fixture
async def arena(make_settings: MakeSettings) -> AsyncIterator[Arena]:
    """Two partitions without an owner."""
    settings = make_settings(kafka_topic_partitions=2, kafka_session_timeout_ms=1000)
    await create_topics(settings)
    client = AIOKafkaConsumer(
        bootstrap_servers=settings.kafka_bootstrap_servers,
        group_id=topic_name(settings, reducer.APP_ID),
        enable_auto_commit=False,
    )
    async with AsyncExitStack() as stack:
        await client.start()
        stack.push_async_callback(client.stop)
        yield Arena(settings, stack, client)


class Freeze:
    """Stops whoever comes first to a method of the producer, until it is told to go on."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, method: str) -> None:
        self.reached = asyncio.Event()
        self.end = asyncio.Event()
        original = getattr(AIOKafkaProducer, method)

        async def call(producer: AIOKafkaProducer, *arguments: Any, **options: Any) -> Any:
            if not self.reached.is_set():
                self.reached.set()
                await self.end.wait()
            return await original(producer, *arguments, **options)

        monkeypatch.setattr(AIOKafkaProducer, method, call)


async def test_who_was_replaced_between_two_batches_writes_nothing(arena: Arena) -> None:
    """The old owner hears that it is fenced, not a byte of its batch is in the log, and its own table is as before."""
    records = await arena.write_stamps("a", "b", "a", "c", "a")
    old, new = arena.enter(), arena.enter()
    await old.open(arena.tp())
    await old.process(arena.tp(), records[:2])

    position = await new.open(arena.tp())
    with pytest.raises(PartitionFenced):
        await old.process(arena.tp(), records[2:4])

    assert position == records[2].offset
    assert await arena.progress(aborted=True) == [2]
    assert old.versions() == {"a": 1, "b": 1}
    await new.process(arena.tp(), records[2:])
    await arena.until_taken(4)
    assert await arena.progress(aborted=True) == [2, 5]
    assert await arena.taken() == [0, 1, 2, 3, 4]
    assert new.versions() == {"a": 3, "b": 1, "c": 1}
    await arena.until_committed(0, records[4].offset + 1)


@pytest.mark.parametrize(
    ("place", "is_in_the_log"),
    [
        ("begin_transaction", False),
        ("send_batch", False),
        ("send_offsets_to_transaction", True),
        ("commit_transaction", True),
    ],
)
@pytest.mark.parametrize("wakes", ["before the new one has written", "afterwards"])
async def test_who_was_replaced_inside_a_transaction_cannot_commit_it(
    arena: Arena, monkeypatch: pytest.MonkeyPatch, place: str, is_in_the_log: bool, wakes: str
) -> None:
    """Wherever the old owner was frozen: what it had sent is aborted, what it still sends is refused."""
    records = await arena.write_stamps("a", "b", "a", "c", "a")
    old, new = arena.enter(), arena.enter()
    await old.open(arena.tp())
    await old.process(arena.tp(), records[:2])
    freeze = Freeze(monkeypatch, place)
    zombie = asyncio.create_task(old.process(arena.tp(), records[2:4]))
    await freeze.reached.wait()
    while is_in_the_log and 4 not in await arena.progress(aborted=True):
        pass  # It sends everything at once, and waits for all of it.

    assert await new.open(arena.tp()) == records[2].offset
    if wakes == "afterwards":
        await new.process(arena.tp(), records[2:3])
    freeze.end.set()
    with pytest.raises(PartitionFenced):
        await zombie
    if wakes != "afterwards":
        await new.process(arena.tp(), records[2:3])
    await new.process(arena.tp(), records[3:])
    await arena.until_taken(4)

    assert await arena.progress() == [2, 3, 5]
    assert (4 in await arena.progress(aborted=True)) == is_in_the_log
    assert await arena.taken() == [0, 1, 2, 3, 4]
    assert (old.versions(), new.versions()) == ({"a": 1, "b": 1}, {"a": 3, "b": 1, "c": 1})
    await arena.until_committed(0, records[4].offset + 1)


async def test_a_node_that_lost_one_partition_goes_on_with_the_others(arena: Arena) -> None:
    """The fenced partition is dropped, nothing crashes; if nobody takes it from the node, it is its own again."""
    async with run_node(arena.settings, ["reducer"], transactions=True) as node:
        await node.wait_until_ready()
        rival = arena.enter()
        await rival.open(arena.tp(0))
        fenced = await arena.write_stamps("a", "b", partition=0)
        await until(lambda: node.status()["reducer"][0].startswith("fenced"))
        other = await arena.write_stamps("x", "y", "z", partition=1)
        await arena.until_committed(1, other[-1].offset + 1)

        assert await arena.committed(0) is None
        assert node.status()["reducer"][1] == "live"
        await rival.process(arena.tp(0), fenced[:1])
        await node.wait_until_ready()
        await arena.until_committed(0, fenced[-1].offset + 1)
        with pytest.raises(PartitionFenced):
            await rival.process(arena.tp(0), fenced[1:])

    await arena.until_taken(1, partition=0)
    await arena.until_taken(2, partition=1)
    assert (await arena.taken(0), await arena.taken(1)) == ([0, 1], [0, 1, 2])
