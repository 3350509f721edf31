"""Contents and activity are what can be counted from the history, at every moment and however the feed comes."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Sequence
from datetime import timedelta
from itertools import pairwise
from typing import Any, NamedTuple

import asyncpg
import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as bounds
from hypothesis import strategies as st
from msgspec.structs import replace

from pipeline.errors import PartitionFenced
from pipeline.events import PROGRESS_KEY, Before, Change, FileState, Progress, Stamp, encode_record
from pipeline.postgres import PostgresConnectionManager
from pipeline.settings import Settings
from projections import storage
from projections.feed import FeedBatch, decode_feed
from projections.watermarks import PROJECTIONS
from projections.writer import ProjectionWriter
from tables.files import Rules, fold
from tests.projection_samples import NOON, Record, instant, make_batch, make_commit, make_refusal, make_state

pytestmark = pytest.mark.integration

#: Small bounds, so that short sequences come to all of them.
RULES = Rules(attempts_max=3, dedup_ids_max=3, dedup_window_ms=8000)

CONTENTS = "SELECT digest, size, copies, bytes, first_seen_at, last_seen_at FROM contents ORDER BY digest"
CONTENTS_OF_HISTORY = """
SELECT digest, size, coalesce(copies, 0) AS copies, size * coalesce(copies, 0) AS bytes, first_seen_at, last_seen_at
FROM (
    SELECT digest, max(size) AS size, min(recorded_at) AS first_seen_at, max(recorded_at) AS last_seen_at
    FROM file_history WHERE outcome IN ('committed', 'unchanged') AND digest IS NOT NULL GROUP BY digest
) AS seen
LEFT JOIN (
    SELECT digest, count(*) AS copies
    FROM (
        SELECT DISTINCT ON (uri) digest FROM file_history WHERE outcome = 'committed' ORDER BY uri, input_offset DESC
    ) AS newest
    WHERE digest IS NOT NULL GROUP BY digest
) AS live USING (digest)
ORDER BY digest
"""
ACTIVITY = "SELECT * FROM activity ORDER BY minute, namespace, op"
ACTIVITY_OF_HISTORY = """
SELECT date_trunc('minute', recorded_at, 'UTC') AS minute, namespace, op, count(*) AS events,
       coalesce(sum(size), 0)::bigint AS bytes,
       count(*) FILTER (WHERE outcome = 'committed') AS committed,
       count(*) FILTER (WHERE outcome = 'unchanged') AS unchanged,
       count(*) FILTER (WHERE outcome = 'duplicate') AS duplicate,
       count(*) FILTER (WHERE outcome = 'conflict') AS conflict,
       count(*) FILTER (WHERE outcome = 'deferred') AS deferred,
       count(*) FILTER (WHERE outcome = 'gave_up') AS gave_up,
       count(*) FILTER (WHERE outcome = 'rejected') AS rejected
FROM file_history GROUP BY 1, 2, 3 ORDER BY minute, namespace, op
"""
#: For a few rows this is ten times faster than TRUNCATE.
CLEAR = """
DELETE FROM stampline.files; DELETE FROM stampline.file_history; DELETE FROM stampline.contents;
DELETE FROM stampline.activity; DELETE FROM stampline.watermarks
"""
#: What must hold in every snapshot, one column each; and how far it is.
INVARIANTS = """
SELECT (SELECT coalesce(sum(copies), 0) FROM contents) = (SELECT count(*) FROM files WHERE NOT deleted) AS copies,
       (SELECT coalesce(sum(events), 0) FROM activity) = (SELECT count(*) FROM file_history) AS events,
       NOT EXISTS (
           SELECT FROM projection_watermarks GROUP BY partition
           HAVING count(*) <> 4
               OR count(DISTINCT (feed_offset, input_offset, event_time, owner)) <> 1
       ) AS watermarks,
       (SELECT sum(feed_offset)::bigint FROM projection_watermarks WHERE projection = 'contents') AS offsets
"""


#: The writers that wait for their lock.
WAITING = "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND mode = 'ShareLock' AND NOT granted"


class Run(NamedTuple):
    """What happens to one partition: its stamps, where they and the feed are cut into batches, and what is disturbed.

    `repeats` are the batches of stamps that come twice, `disturbed` the batches of the feed that a crash and a zombie
    meet.
    """

    stamps: list[Stamp]
    stamp_cuts: set[int]
    feed_cuts: set[int]
    repeats: set[int]
    disturbed: set[int]


@st.composite
def stamps(draw: st.DrawFn, partition: int) -> list[Stamp]:
    """Draw a chain of stamps of a few files of a partition, which share their contents with all others."""
    chain: list[Stamp] = []
    offset = -1
    for _ in range(draw(st.integers(0, 25))):
        offset += draw(st.integers(1, 3))
        op = draw(st.sampled_from(["created", "modified", "modified", "deleted", "moved"]))
        rejected = draw(st.integers(0, 9)) == 0
        content = None if rejected or op in {"deleted", "moved"} else draw(st.integers(1, 3))
        chain.append(
            Stamp(
                input_offset=offset,
                previous_offset=chain[-1].input_offset if chain else None,
                uri=draw(st.sampled_from(["a", "b", "c"])) + str(partition)
                if not rejected or draw(st.booleans())
                else None,
                event_id=draw(st.sampled_from([f"event-{offset}", f"event-{offset}", "again"])),
                op=op,
                namespace=draw(st.sampled_from(["n", "m"])),
                occurred_at=NOON,
                recorded_at=NOON + timedelta(seconds=offset + draw(st.integers(-70, 70))),
                stamped_at=NOON + timedelta(seconds=offset),
                digest=bytes([content]) * 32 if content is not None else None,
                size=content * 100 if content is not None else None,
                reason="content_unavailable" if rejected else None,
                expected_version=draw(st.sampled_from([None, None, 0, 1, 2, 9])),
                metadata=draw(st.sampled_from([None, None, b'{"k": 1}'])),
                attempt=draw(st.sampled_from([0, 3])),
            )
        )
    return chain


@st.composite
def runs(draw: st.DrawFn, partition: int) -> Run:
    """Draw what happens to one partition."""
    places = st.sets(st.integers(0, 30), max_size=8)
    return Run(draw(stamps(partition)), draw(places), draw(places), draw(places), draw(places))


def pieces(length: int, cuts: set[int]) -> list[tuple[int, int]]:
    """Cut a length into pieces at these places."""
    return list(pairwise(sorted({0, length, *(cut for cut in cuts if cut < length)})))


def reduce_all(run: Run) -> list[Record]:
    """Run the stamps through the reducer and return the changelog that it writes."""
    changelog: list[Record] = []
    store: dict[bytes, bytes] = {}
    progress: Progress | None = None
    for number, (begin, end) in enumerate(pieces(len(run.stamps), run.stamp_cuts)):
        for _ in range(2 if number in run.repeats else 1):
            folded = fold(run.stamps[begin:end], store.get, progress, RULES)
            progress = folded.progress
            store.update(folded.changes)
            for key, value in [*folded.changes, (PROGRESS_KEY, encode_record(progress))]:
                changelog.append(Record(key, value, len(changelog)))
    return changelog


@pytest.fixture
async def manager(settings: Settings) -> AsyncIterator[PostgresConnectionManager]:
    """Open connections to this test's database."""
    async with PostgresConnectionManager(settings) as manager:
        yield manager


@pytest.fixture
async def analyst(database: str) -> AsyncIterator[asyncpg.Connection[asyncpg.Record]]:
    """A connection beside those of the writers."""
    connection = await asyncpg.connect(database)
    yield connection
    await connection.close()


async def fetch(analyst: asyncpg.Connection[asyncpg.Record], statement: str) -> list[dict[str, Any]]:
    """Return rows as mappings."""
    return [dict(row) for row in await analyst.fetch(statement)]


async def assert_counted(analyst: asyncpg.Connection[asyncpg.Record]) -> None:
    """Compare what was added up with what the history says."""
    assert await fetch(analyst, CONTENTS) == await fetch(analyst, CONTENTS_OF_HISTORY)
    assert await fetch(analyst, ACTIVITY) == await fetch(analyst, ACTIVITY_OF_HISTORY)


async def project(manager: PostgresConnectionManager, partition: int, run: Run) -> None:
    """Write a whole feed in its pieces; around some of them a crash takes a write back and a zombie repeats one."""
    changelog = reduce_all(run)
    writer = ProjectionWriter(manager, "one")
    assert await writer.open_partition(partition) == 0
    for number, (begin, end) in enumerate(pieces(len(changelog), run.feed_cuts)):
        batch = decode_feed(changelog[begin:end])
        if number in run.disturbed:
            assert await writer.attempt(partition, begin, batch, end) is None
        await writer.write(partition, begin, batch, end)
        if number in run.disturbed:
            with pytest.raises(PartitionFenced):
                await ProjectionWriter(manager, "zombie").write(partition, begin, batch, end)


@given(first=runs(0), second=runs(1))
@bounds(max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
async def test_what_is_added_up_can_be_counted(
    manager: PostgresConnectionManager, analyst: asyncpg.Connection[asyncpg.Record], first: Run, second: Run
) -> None:
    """Whatever comes, repeated stamps, batches taken back and zombies too: contents and activity tell what plain SQL
    counts from the history.
    """
    await analyst.execute(CLEAR)
    await project(manager, 0, first)
    await project(manager, 1, second)

    await assert_counted(analyst)
    (row,) = await fetch(analyst, INVARIANTS)
    assert (row["copies"], row["events"], row["watermarks"]) == (True, True, True)


def make_feed(partition: int, length: int) -> list[FeedBatch]:
    """Make a feed of many files that change often and share many contents with the other partitions, in batches."""
    draw = random.Random(partition)
    states: dict[bytes, FileState] = {}
    batches: list[FeedBatch] = []
    offset = 0
    while offset < length:
        keys: list[bytes] = []
        changes: list[Change] = []
        for _ in range(min(draw.randrange(200, 1800), length - offset)):
            key = b"%d/%d" % (partition, draw.randrange(length // 3))
            state = states.get(key)
            if state is not None and draw.random() < 0.2:
                change = make_refusal(offset, state, outcome=draw.choice(["unchanged", "duplicate", "conflict"]))
                if change.outcome == "unchanged" and change.event is not None:
                    # Of an input that changes nothing the content is that of the file.
                    change = replace(change, event=replace(change.event, digest=state.digest, size=state.size))
            else:
                content, gone = draw.randrange(5000), draw.random() < 0.1
                before = Before(state.digest, state.size, state.deleted) if state is not None else None
                state = make_state(
                    offset,
                    version=state.version + 1 if state is not None else 1,
                    digest=None if gone else content.to_bytes(32),
                    size=None if gone else content,
                    deleted=gone,
                )
                change = Change(
                    outcome="committed", input_offset=offset, recorded_at=instant(offset), state=state, before=before
                )
                states[key] = state
            keys.append(key)
            changes.append(change)
            offset += 1
        batches.append(FeedBatch(keys, changes, offset))
    return batches


async def test_every_snapshot_agrees_while_partitions_write_at_once(
    manager: PostgresConnectionManager, analyst: asyncpg.Connection[asyncpg.Record]
) -> None:
    """While 100,000 changes of four partitions come in, with the same contents, every look at the views finds copies
    as many as live files, events as many as rows of the history, and the watermarks of each partition at one place.
    """
    partitions, length = 4, 25_000

    async def write(partition: int, batches: Sequence[FeedBatch]) -> None:
        writer = ProjectionWriter(manager, f"writer-{partition}")
        offset = await writer.open_partition(partition)
        for batch in batches:
            await writer.write(partition, offset, batch, offset + len(batch.changes))
            offset += len(batch.changes)

    feeds = [make_feed(partition, length) for partition in range(partitions)]
    offsets: list[int] = []
    async with asyncio.TaskGroup() as group:
        writing = [group.create_task(write(partition, batches)) for partition, batches in enumerate(feeds)]
        done = False
        while not done:
            done = all(task.done() for task in writing)  # One more look after the last write.
            (row,) = await fetch(analyst, INVARIANTS)
            assert (row["copies"], row["events"], row["watermarks"]) == (True, True, True)
            offsets.append(row["offsets"])

    assert offsets[-1] == partitions * length
    assert len(set(offsets)) > 10  # It did look in between.
    assert await analyst.fetchval("SELECT deadlocks FROM pg_stat_database WHERE datname = current_database()") == 0
    await assert_counted(analyst)


async def test_a_copy_that_nobody_knows_is_not_taken_away(
    manager: PostgresConnectionManager, analyst: asyncpg.Connection[asyncpg.Record]
) -> None:
    """Where the change that brought a content was refused, there is nothing to take from, and the rest goes on."""
    writer = ProjectionWriter(manager, "one")
    await writer.open_partition(3)
    lost = Change(
        outcome="committed",
        input_offset=2,
        recorded_at=instant(2),
        state=make_state(2, version=3),
        before=Before(b"\x99" * 32, 5, deleted=False),
    )
    result = await writer.write(3, 0, make_batch(("a", lost)), 1)

    assert result.rows["contents"] == 1
    assert [row["digest"] for row in await fetch(analyst, CONTENTS)] == ["02" * 32]


async def test_a_content_without_copies_stays(
    manager: PostgresConnectionManager, analyst: asyncpg.Connection[asyncpg.Record]
) -> None:
    """What was once there has no copies and keeps its times; what has two is among the duplicates with its files."""
    writer = ProjectionWriter(manager, "one")
    await writer.open_partition(3)
    digest = b"\x07" * 32
    first, second = (make_commit(offset, digest=digest, size=10) for offset in (1, 2))
    await writer.write(3, 0, make_batch(("a", first), ("b", second)), 2)
    duplicates = await fetch(analyst, "SELECT * FROM duplicates")
    gone = [
        Change(
            outcome="committed",
            input_offset=offset,
            recorded_at=instant(offset),
            state=make_state(offset, version=2, digest=None, size=None, deleted=True, op="deleted"),
            before=Before(digest, 10, deleted=False),
        )
        for offset in (3, 4)
    ]
    await writer.write(3, 2, make_batch(("b", gone[0]), ("a", gone[1])), 4)

    assert duplicates == [{"digest": "07" * 32, "size": 10, "copies": 2, "wasted_bytes": 10, "uris": ["a", "b"]}]
    assert await fetch(analyst, "SELECT * FROM duplicates") == []
    assert await fetch(analyst, CONTENTS) == [
        {
            "digest": "07" * 32,
            "size": 10,
            "copies": 0,
            "bytes": 0,
            "first_seen_at": instant(1),
            "last_seen_at": instant(2),
        }
    ]


@pytest.mark.parametrize("name", PROJECTIONS)
async def test_rows_get_into_the_table_of_another_schema(
    manager: PostgresConnectionManager, analyst: asyncpg.Connection[asyncpg.Record], name: str
) -> None:
    """A rebuild writes a table of the same name beside the live one: what is staged again in the same transaction
    replaces what was staged, a second apply adds to the first, and the live table has nothing of it.
    """
    await analyst.execute(
        f"CREATE TABLE {storage.SHADOW}.{name} (LIKE {storage.LIVE}.{name} INCLUDING DEFAULTS INCLUDING INDEXES)"
    )
    batches = [make_batch(("a", make_commit(1)), ("b", make_commit(2))), make_batch(("c", make_commit(3)))]
    written = []
    async with manager.connection() as connection, connection.transaction():
        for batch in batches:
            rows = storage.make_rows(name, batch, 3, NOON)
            await storage.stage(connection, name, rows, storage.SHADOW)
            written.append(await storage.apply(connection, name, 3, NOON, storage.SHADOW))

    total = {"activity": "sum(events)", "contents": "sum(copies)"}.get(name, "count(*)")
    assert await analyst.fetchval(f"SELECT count(*) FROM {storage.LIVE}.{name}") == 0  # noqa: S608
    assert await analyst.fetchval(f"SELECT {total} FROM {storage.SHADOW}.{name}") == 3  # noqa: S608
    assert written == {"file_history": [0, 0], "activity": [1, 1]}.get(name, [2, 1])


async def test_nothing_staged_is_nothing_applied(manager: PostgresConnectionManager) -> None:
    """A piece of the feed without changes may be staged and applied like any other, also in a new session."""
    async with manager.connection() as connection, connection.transaction():
        for name in PROJECTIONS:
            await storage.stage(connection, name, storage.make_rows(name, make_batch(), 3, NOON))
            assert await storage.apply(connection, name, 3, NOON) == 0


async def test_writers_wait_while_somebody_writes_alone(
    manager: PostgresConnectionManager, analyst: asyncpg.Connection[asyncpg.Record], database: str
) -> None:
    """A swap of tables takes the writers' lock alone: a write that comes meanwhile waits before it touches any table,
    and goes on afterwards.
    """
    writer = ProjectionWriter(manager, "one")
    await writer.open_partition(3)
    holder = await asyncpg.connect(database)
    async with holder.transaction():
        await holder.execute("SELECT pg_advisory_xact_lock($1)", storage.WRITERS_LOCK)
        writing = asyncio.create_task(writer.write(3, 0, make_batch(("a", make_commit(1))), 1))
        async with asyncio.timeout(10):
            waiting = 0
            while not waiting:
                waiting = await analyst.fetchval(WAITING)
        tables = await analyst.fetchval("SELECT count(*) FROM pg_locks WHERE relation = 'stampline.files'::regclass")
    await holder.close()

    assert (await writing).rows["files"] == 1
    assert tables == 0


async def test_the_feed_ends_where_it_is_projected_to_at_the_earliest(
    manager: PostgresConnectionManager, analyst: asyncpg.Connection[asyncpg.Record]
) -> None:
    """A write does not take back where the feed was last seen to end, and moves it where it goes past that."""
    writer = ProjectionWriter(manager, "one")
    await writer.open_partition(3)
    await analyst.execute("UPDATE stampline.watermarks SET feed_end = 5")
    ends = []
    for offset in (0, 4):
        await writer.write(3, offset, make_batch((f"f{offset}", make_commit(offset))), offset + 4)
        ends += await analyst.fetch("SELECT DISTINCT feed_end FROM stampline.watermarks")

    assert [tuple(row) for row in ends] == [(5,), (8,)]
