"""What PostgreSQL refuses becomes a dead letter, the rest goes on, and a fault of the tables is no dead letter."""

from __future__ import annotations

from collections import Counter
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from datetime import UTC, datetime
from functools import partial
from itertools import count
from typing import Any, cast

import pytest
from faust.types import TP

from agents.projector import Projector
from pipeline.client import Position
from pipeline.errors import PartitionFenced, PositionLost, RowsRefused, SettingsError
from pipeline.events import Change, FileEvent, decode_change
from pipeline.kafka import partition_for
from pipeline.lanes import Batch
from pipeline.logreader import LogReader
from pipeline.postgres import PostgresConnectionManager
from pipeline.records import Record
from pipeline.topics import DEAD_LETTERS, FILES_CHANGELOG, has_transactions, topic_name
from pipeline.transactions import Writer
from pipeline.transport import BatchConsumer, LogRange, Reach
from pipeline.verify import all_faults, verify
from projections.refusals import REFUSALS_MAX
from projections.watermarks import PROJECTIONS
from projections.writer import ProjectionWriter
from tests.fix_road import Road, make_events
from tests.projection_samples import make_batch, make_commit, make_records

pytestmark = pytest.mark.integration

NO_POISON = "ALTER TABLE stampline.{} ADD CONSTRAINT no_poison CHECK (uri NOT LIKE '%poison%')"
NOTHING_GOES = "ALTER TABLE stampline.files ADD CONSTRAINT nothing_goes CHECK (false) NOT VALID"
SHOWN = "SELECT uri, version, input_offset FROM files ORDER BY uri"
TOTALS = (
    "SELECT (SELECT sum(copies) FROM contents), (SELECT count(*) FROM files WHERE NOT deleted), "
    "(SELECT sum(events) FROM activity), (SELECT count(*) FROM file_history)"
)
HISTORY = "SELECT input_offset, uri, outcome, version FROM file_history ORDER BY input_offset"


class Killed(Exception):
    """Stands for a process that ends here."""


class QuietConsumer:
    """What a projector asks of its consumer."""

    async def log_range(self, tp: TP) -> LogRange:
        """Tell of a log that nothing was deleted from."""
        return LogRange(0, None, None)

    async def commit_offsets(self, offsets: Mapping[TP, int]) -> None:
        """Mirror the position for nobody."""

    async def reaches(self, partitions: Iterable[TP]) -> dict[TP, Reach]:
        """Know of nothing that was fetched."""
        return {}


class Feed:
    """Partition 3 of a changelog that is written by hand, and the projectors that read it."""

    def __init__(self, road: Road, manager: PostgresConnectionManager, *, transactions: bool) -> None:
        self.road = road
        self.tp = TP(topic_name(road.settings, FILES_CHANGELOG), 3)
        self.projectors: list[Projector] = []
        self._manager = manager
        self._transactions = transactions

    async def write(self, *changes: tuple[str, Change]) -> None:
        """Append changes to the feed."""
        records = [Record(record.key, record.value, [("h", b"1")]) for record in make_records(*changes)]
        writer = Writer(
            self.road.settings,
            partition=3,
            group="none",
            transactional_id=None,
            idempotent=self._transactions,
            commit_offsets=QuietConsumer().commit_offsets,
        )
        await writer.open()
        try:
            await writer.write({self.tp.topic: records}, {})
        finally:
            await writer.aclose()

    async def take_over(self) -> tuple[Projector, int]:
        """Return a new projector that owns the partition, and where it begins."""
        projector = Projector(self.road.settings, self._manager, transactions=self._transactions)
        self.projectors.append(projector)
        return projector, await self.reopen(projector)

    async def reopen(self, projector: Projector) -> int:
        """Close and open the partition, as its lane does after an error; return where to go on."""
        await projector.close(self.tp)
        return await projector.open(self.tp, cast("BatchConsumer", QuietConsumer()))

    async def batch(self, begin: int, end: int | None = None) -> Batch:
        """Read records of the feed as one batch."""
        records = await read_all(self.road, FILES_CHANGELOG, 3)
        return Batch(self.tp, [record for record in records if begin <= record.offset][: end and end - begin])


@pytest.fixture
async def feed(road: Road) -> AsyncIterator[Feed]:
    """A feed whose tables take no uri with `poison` in it."""
    for table in ("files", "file_history"):
        await road.fetch(NO_POISON.format(table))
    async with PostgresConnectionManager(road.settings) as manager:
        feed = Feed(road, manager, transactions=await has_transactions(road.settings))
        yield feed
        for projector in feed.projectors:
            await projector.close(feed.tp)


async def read_all(road: Road, name: str, partition: int) -> list[Any]:
    """Read all records of one partition of a topic."""
    async with LogReader(road.settings, topic_name(road.settings, name), partition) as reader:
        return [record async for records in reader.read(0) for record in records]


async def read_letters(road: Road) -> list[tuple[int, Any, dict[str, str]]]:
    """Return the partition, the record and the facts of every dead letter."""
    return [
        (partition, record, {name: value.decode() for name, value in record.headers if name.startswith("dl-")})
        for partition in range(4)
        for record in await read_all(road, DEAD_LETTERS, partition)
    ]


def make_poison(*names: str) -> list[FileEvent]:
    """Make an event for each of these names, below a folder that the tables do not take."""
    return [
        FileEvent(
            event_id=f"poison-{number}",
            uri=f"file:///poison/{name}",
            op="modified",
            occurred_at=datetime.now(UTC),
            content=b"%d" % number,
        )
        for number, name in enumerate(names)
    ]


async def test_what_postgres_refuses_is_a_dead_letter_and_the_rest_goes_on(road: Road) -> None:
    """Each refused change is a dead letter with its bytes; every other one has its rows, and `verify` tells exactly
    that much until the changes are projected after all.
    """
    for table in ("files", "file_history"):
        await road.fetch(NO_POISON.format(table))
    good = make_events(3000, 300, seed=1)
    poison = make_poison("a", "b", "a", "c")
    road.start("hasher", "reducer")
    positions = await road.send(good[:1500])
    bad_positions = await road.send(poison)
    positions += await road.send(good[1500:])
    projector = road.start("projector")
    await road.until_visible([*positions, *bad_positions])

    await road.assert_exact(good, positions)
    originals = {
        (partition, record.offset): (record.key, record.value)
        for partition in range(4)
        for record in await read_all(road, FILES_CHANGELOG, partition)
    }
    letters = await read_letters(road)
    assert Counter(record.key.decode() for _, record, _ in letters) == Counter(event.uri for event in poison)
    for partition, record, facts in letters:
        assert originals[int(facts["dl-partition"]), int(facts["dl-offset"])] == (record.key, record.value)
        assert int(facts["dl-partition"]) == partition
        assert (facts["dl-topic"], facts["dl-reason"], facts["dl-attempts"]) == (
            topic_name(road.settings, FILES_CHANGELOG),
            "projection_refused",
            "1",
        )
        assert 'violates check constraint "no_poison"' in facts["dl-error"]
        assert "poison/" not in facts["dl-error"]
    assert projector.log.read_text().count('"dead_letter_written"') == len(poison)

    assert [report.faults for report in (await verify(road.settings)).partitions] == [
        expected_faults(poison, bad_positions, partition) for partition in range(4)
    ]

    assert projector.terminate() == 0
    for table in ("files", "file_history"):
        await road.fetch(f"ALTER TABLE stampline.{table} DROP CONSTRAINT no_poison")
    tables = ", ".join(f"stampline.{name}" for name in (*PROJECTIONS, "watermarks"))
    await road.fetch(f"TRUNCATE {tables}")
    road.start("projector")
    await road.until_visible([*positions, *bad_positions])

    await road.assert_exact(good + poison, [*positions, *bad_positions])
    assert all_faults(await verify(road.settings)) == []
    [[copies, live, events, inputs]] = await road.fetch(TOTALS)
    assert (copies, events) == (live, inputs)


def expected_faults(poison: Sequence[FileEvent], positions: Sequence[Position], partition: int) -> list[str]:
    """Say of one partition what was refused there."""
    offsets = sorted(offset for number, offset in positions if number == partition)
    uris = sorted({event.uri for event in poison if partition_for(event.uri.encode(), 4) == partition})
    fault = (
        f"{len(offsets)} changes were refused by PostgreSQL and are dead letters "
        f"(input offsets {', '.join(map(str, offsets))}): "
        f"the rows of {len(uris)} files lag behind: {', '.join(uris)}"
    )
    return [fault] if offsets else []


async def test_tables_that_refuse_everything_do_not_fill_the_dead_letters(road: Road) -> None:
    """A constraint that nothing satisfies stops each partition after a few dead letters at most, the log says what is
    wrong, and once it is gone the partition goes on by itself with all the rest.
    """
    await road.fetch(NOTHING_GOES)
    road.start("hasher", "reducer")
    events = make_events(2000, 400, seed=2)
    positions = await road.send(events)
    projector = road.start("projector")
    await road.until(partial(projector.has_logged, "too many changes for it to be about single ones"))
    await road.fetch("ALTER TABLE stampline.files DROP CONSTRAINT nothing_goes")
    await road.until_visible(positions)

    assert (
        '(new row for relation \\"files\\" violates check constraint \\"nothing_goes\\")' in projector.log.read_text()
    )
    letters = await read_letters(road)
    lost = {(partition, decode_change(record.value).input_offset) for partition, record, _ in letters}
    refused = Counter(partition for partition, _ in lost)
    assert max(refused.values(), default=0) <= REFUSALS_MAX
    history = await road.fetch("SELECT input_partition, input_offset FROM file_history")
    assert Counter(tuple(row) for row in history) == Counter(tuple(each) for each in positions if each not in lost)
    faults = [report.faults for report in (await verify(road.settings)).partitions]
    assert [[fault.partition(" and are")[0] for fault in each] for each in faults] == [
        [f"{refused[partition]} changes were refused by PostgreSQL"] if refused[partition] else []
        for partition in range(4)
    ]


async def test_a_batch_that_is_refused_throughout_leaves_nothing(feed: Feed) -> None:
    """The partition stops before any dead letter, as often as it is opened, and goes on where the tables are mended."""
    await feed.road.fetch(NOTHING_GOES)
    await feed.write(*((f"f{n}", make_commit(n)) for n in range(500)))
    projector, start = await feed.take_over()
    for _ in range(3):
        with pytest.raises(RowsRefused, match=r'the first at feed offset 0 \(new row .* constraint "nothing_goes"\)'):
            await projector.process(await feed.batch(start))
        assert await feed.reopen(projector) == start
    await feed.road.fetch("ALTER TABLE stampline.files DROP CONSTRAINT nothing_goes")
    await projector.process(await feed.batch(start))
    await projector.close(feed.tp)

    assert await read_letters(feed.road) == []
    assert len(await feed.road.fetch(HISTORY)) == len(await feed.road.fetch(SHOWN)) == 500


@pytest.mark.parametrize(("point", "letters"), [("before the letter", 1), ("before the rows", 2), ("after", 1)])
async def test_a_projector_killed_around_a_dead_letter_leaves_it_exact(
    feed: Feed, monkeypatch: pytest.MonkeyPatch, point: str, letters: int
) -> None:
    """Wherever it dies, the next owner has every row once; a dead letter that comes again is known by its place."""
    await feed.write(*((f"f{n % 5}" if n != 6 else "poison", make_commit(n, version=n)) for n in range(1, 20)))
    first, start = await feed.take_over()
    write, calls = ProjectionWriter.write, count()

    async def die(*_arguments: Any) -> Any:
        raise Killed

    async def write_or_die(*arguments: Any) -> Any:
        again = next(calls) == 1
        if again and point == "before the rows":
            raise Killed
        result = await write(*arguments)
        if again and point == "after":
            raise Killed
        return result

    with monkeypatch.context() as patch:
        patch.setattr(ProjectionWriter, "write", write_or_die)
        if point == "before the letter":
            patch.setattr(Projector, "_open_letters", die)
        with pytest.raises(Killed):
            await first.process(await feed.batch(start))
    second, position = await feed.take_over()
    if point != "after":
        assert position == start
        await second.process(await feed.batch(position))
    for projector in (first, second):
        await projector.close(feed.tp)

    found = await read_letters(feed.road)
    [original] = [record for record in await read_all(feed.road, FILES_CHANGELOG, 3) if record.key == b"poison"]
    places = {(facts["dl-topic"], facts["dl-partition"], facts["dl-offset"]) for _, _, facts in found}
    assert (len(found), places) == (letters, {(feed.tp.topic, "3", str(original.offset))})
    assert {(record.key, record.value, record.headers[0]) for _, record, _ in found} == {
        (original.key, original.value, ("h", b"1"))
    }
    history = [row["input_offset"] for row in await feed.road.fetch(HISTORY)]
    assert history == [n for n in range(1, 20) if n != 6]
    assert {row["uri"]: row["version"] for row in await feed.road.fetch(SHOWN)} == {
        f"f{n % 5}": n for n in (15, *range(16, 20))
    }
    assert (await feed.take_over())[1] == original.offset + 14


async def test_poison_in_small_batches_stops_the_partition_too(feed: Feed) -> None:
    """Batches of one record that are all refused become dead letters up to the bound, and opening the partition again
    earns nothing; a new process, which somebody has started, begins anew.
    """
    poison = [("poison", make_commit(n)) for n in range(REFUSALS_MAX + 1)]
    await feed.write(*poison, *((f"f{n}", make_commit(n)) for n in range(50, 250)))
    projector, _ = await feed.take_over()
    for offset in range(REFUSALS_MAX):
        await projector.process(await feed.batch(offset, offset + 1))
    for _ in range(2):
        assert await feed.reopen(projector) == REFUSALS_MAX
        with pytest.raises(RowsRefused, match=f"the first at feed offset {REFUSALS_MAX} "):
            await projector.process(await feed.batch(REFUSALS_MAX))
    assert len(await read_letters(feed.road)) == REFUSALS_MAX

    other, position = await feed.take_over()
    await other.process(await feed.batch(position))
    for each in (projector, other):
        await each.close(feed.tp)

    assert len(await read_letters(feed.road)) == REFUSALS_MAX + 1
    assert len(await feed.road.fetch(HISTORY)) == 200


async def test_an_input_that_comes_twice_is_no_dead_letter(feed: Feed) -> None:
    """A feed that holds an input twice is not exact: the partition stops, beside poison too, and nothing is written."""
    await feed.write(("a", make_commit(1)), ("poison", make_commit(2)), ("b", make_commit(3)), ("c", make_commit(3)))
    projector, start = await feed.take_over()

    for batch in (await feed.batch(start), await feed.batch(2)):
        with pytest.raises(PositionLost, match=r"is in the history already .*\(3, 3, "):
            await projector.process(batch)

    await projector.close(feed.tp)
    assert (await read_letters(feed.road), await feed.road.fetch(HISTORY)) == ([], [])


async def test_a_zombie_writes_no_dead_letter(feed: Feed) -> None:
    """A projector that lost its partition finds out before it sends what PostgreSQL refuses."""
    await feed.write(("poison", make_commit(1)), ("a", make_commit(2)))
    zombie, start = await feed.take_over()
    batch = await feed.batch(start)
    owner, _ = await feed.take_over()
    await owner.process(batch)

    for records in (batch, await feed.batch(0, 1)):
        with pytest.raises(PartitionFenced):
            await zombie.process(records)

    for projector in (zombie, owner):
        await projector.close(feed.tp)
    assert len(await read_letters(feed.road)) == 1


async def test_a_lost_partition_of_the_history_is_made_again(feed: Feed) -> None:
    """That the history has no place for now is not about the records: no dead letter, and the next try has one."""
    await feed.write(("a", make_commit(1)), ("b", make_commit(2)))
    projector, start = await feed.take_over()
    for [table] in await feed.road.fetch(
        "SELECT inhrelid::regclass::text FROM pg_inherits WHERE inhparent = 'stampline.file_history'::regclass"
    ):
        await feed.road.fetch(f"DROP TABLE {table}")

    with pytest.raises(SettingsError, match="the history has no partition for this month"):
        await projector.process(await feed.batch(start))
    await feed.reopen(projector)
    await projector.process(await feed.batch(start))
    await projector.close(feed.tp)

    assert len(await feed.road.fetch(HISTORY)) == 2
    assert await read_letters(feed.road) == []


REFUSED: Sequence[tuple[str, Change, str]] = [
    ("a", make_commit(2, size=2**63), "int64"),
    ("a", make_commit(2, version=2**63), "int64"),
    ("a", make_commit(2, digest=b"short"), "violates check constraint"),
    ("a", make_commit(2, metadata=b"\xff"), "codec can't decode byte 0xff"),
    ("a", make_commit(2, metadata=b'{"k": "\\u0000"}'), "unsupported Unicode escape sequence"),
    ("a", make_commit(2, metadata=b"{"), "invalid input syntax for type json"),
    ("a\x00b", make_commit(2), "invalid byte sequence"),
    ("a", make_commit(2, namespace="n\x00"), "invalid byte sequence"),
    ("a", make_commit(2, event_id="\ud800"), "surrogates not allowed"),
]


@pytest.mark.parametrize(("uri", "change", "said"), REFUSED, ids=[said for _, _, said in REFUSED])
async def test_every_value_that_cannot_be_written_is_refused_alike(
    road: Road, uri: str, change: Change, said: str
) -> None:
    """Whether our rows, the driver or the server does not take a value, it is one error, one line, and no trace."""
    async with PostgresConnectionManager(road.settings) as manager:
        writer = ProjectionWriter(manager, "one")
        await writer.open_partition(3)
        batch = make_batch(("good", make_commit(1)), (uri, change))
        with pytest.raises(RowsRefused, match=said) as caught:
            await writer.write(3, 0, batch, 9)
        assert await writer.attempt(3, 0, batch, 9) == str(caught.value)
        assert await writer.attempt(3, 0, make_batch(("good", make_commit(1))), 9) is None

        assert "\n" not in str(caught.value)
        assert (await road.fetch(HISTORY), await writer.open_partition(3)) == ([], 0)
        await writer.write(3, 0, make_batch(("good", make_commit(1))), 9)
        assert len(await road.fetch(HISTORY)) == 1
