"""Rows and watermarks in one transaction, against a real server."""

from __future__ import annotations

import asyncio
import itertools
import random
from collections.abc import AsyncIterator
from datetime import UTC, datetime

import asyncpg
import pytest

from pipeline.errors import PartitionFenced, PositionLost, RowsRefused, ServiceUnavailable
from pipeline.postgres import PostgresConnectionManager
from pipeline.settings import Settings
from projections.feed import FeedBatch, decode_feed
from projections.watermarks import PROJECTIONS
from projections.writer import ProjectionWriter, WriteResult
from tests.projection_samples import (
    NOON,
    instant,
    make_batch,
    make_commit,
    make_feed,
    make_progress,
    make_records,
    make_refusal,
    make_state,
)

pytestmark = pytest.mark.integration

WATERMARKS = """
SELECT projection, feed_offset, input_offset, event_time, owner FROM projection_watermarks
WHERE partition = 3 ORDER BY projection
"""
INPUTS = "SELECT uri, input_offset FROM file_history ORDER BY input_offset"


@pytest.fixture
async def manager(settings: Settings) -> AsyncIterator[PostgresConnectionManager]:
    """Open connections to this test's database."""
    async with PostgresConnectionManager(settings) as manager:
        yield manager


@pytest.fixture
def writer(manager: PostgresConnectionManager) -> ProjectionWriter:
    """The writer of a projector called one."""
    return ProjectionWriter(manager, "one")


@pytest.fixture
async def analyst(database: str) -> AsyncIterator[asyncpg.Connection[asyncpg.Record]]:
    """A connection beside those of the writers."""
    connection = await asyncpg.connect(database)
    yield connection
    await connection.close()


async def counts(analyst: asyncpg.Connection[asyncpg.Record]) -> tuple[int, int]:
    """Count the rows of `files` and of the history; `activity` must have counted as many as the latter."""
    row = await analyst.fetchrow(
        "SELECT (SELECT count(*) FROM files), (SELECT count(*) FROM file_history), "
        "(SELECT coalesce(sum(events), 0)::bigint FROM activity)"
    )
    assert row is not None
    shown, told, counted = row
    assert told == counted
    return shown, told


async def wait_until_blocked(analyst: asyncpg.Connection[asyncpg.Record], statement: str) -> int:
    """Wait until a backend waits for a lock in a statement that begins so; return its process id."""
    async with asyncio.timeout(10):
        while True:
            pid: int | None = await analyst.fetchval(
                "SELECT pid FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock' "
                "AND query ILIKE $1 || '%'",
                statement,
            )
            if pid is not None:
                return pid


async def test_a_new_partition_begins_at_zero(
    writer: ProjectionWriter, analyst: asyncpg.Connection[asyncpg.Record]
) -> None:
    """Opening makes the watermarks that are missing and names the owner; opening again finds them."""
    assert await writer.open_partition(3) == 0
    assert await writer.open_partition(3) == 0

    rows = [tuple(row) for row in await analyst.fetch(WATERMARKS)]
    assert rows == [(name, 0, 0, None, "one") for name in sorted(PROJECTIONS)]


async def test_rows_and_watermarks_come_together(
    writer: ProjectionWriter, analyst: asyncpg.Connection[asyncpg.Record]
) -> None:
    """After a write all views tell the batch, and the watermarks how far feed and input have come."""
    before = datetime.now(UTC)
    commit = make_commit(1, metadata=b'{"k": [1]}', workflow_id="w")
    records = make_records(
        ("file:///a", commit),
        ("file:///b", make_commit(2)),
        ("file:///a", make_refusal(3, commit.state, reason="expected_version 0, is 1")),
    )
    start = await writer.open_partition(3)
    result = await writer.write(3, start, decode_feed([*records, make_progress(9, 3)]), 5)

    row = await analyst.fetchrow("SELECT * FROM files WHERE uri = 'file:///a'")
    history = await analyst.fetch("SELECT * FROM file_history ORDER BY input_offset")
    assert row is not None
    assert dict(row) == {
        "uri": "file:///a",
        "namespace": "default",
        "digest": "01" * 32,
        "size": 101,
        "version": 1,
        "op": "modified",
        "deleted": False,
        "occurred_at": make_state(1).occurred_at,
        "stamped_at": make_state(1).stamped_at,
        "projected_at": result.projected_at,
        "event_id": "event-1",
        "workflow_id": "w",
        "metadata": '{"k": [1]}',
        "input_partition": 3,
        "input_offset": 1,
    }
    assert [each["outcome"] for each in history] == ["committed", "committed", "conflict"]
    assert history[2]["digest"] == "ee" * 32
    assert history[2]["recorded_at"] == instant(3)
    assert {each["projected_at"] for each in history} == {result.projected_at}
    assert before <= result.projected_at <= datetime.now(UTC)
    contents = await analyst.fetch("SELECT digest, copies, bytes FROM contents ORDER BY digest")
    activity = await analyst.fetch("SELECT namespace, op, events, bytes, committed, conflict FROM activity ORDER BY op")
    assert [tuple(each) for each in contents] == [("01" * 32, 1, 101), ("02" * 32, 1, 102)]
    assert [tuple(each) for each in activity] == [
        ("other", "created", 1, 9, 0, 1),
        ("default", "modified", 2, 203, 2, 0),
    ]
    assert result.rows == {"files": 2, "file_history": 3, "contents": 2, "activity": 2}
    watermarks = [tuple(each) for each in await analyst.fetch(WATERMARKS)]
    assert watermarks == [(name, 5, 9, instant(3), "one") for name in sorted(PROJECTIONS)]
    assert await writer.open_partition(3) == 5


async def test_a_batch_without_changes_moves_the_watermark(
    writer: ProjectionWriter, analyst: asyncpg.Connection[asyncpg.Record]
) -> None:
    """Progress alone, and even transaction markers alone, count as come to; the event time stays what it was."""
    await writer.open_partition(3)
    await writer.write(3, 0, make_batch(("a", make_commit(1))), 1)
    await writer.write(3, 1, decode_feed([make_progress(7, 1)]), 2)
    await writer.write(3, 2, decode_feed([]), 3)

    rows = [tuple(row)[1:4] for row in await analyst.fetch(WATERMARKS)]
    assert rows == [(3, 7, instant(1))] * len(PROJECTIONS)


async def test_a_fenced_writer_leaves_nothing(
    writer: ProjectionWriter, analyst: asyncpg.Connection[asyncpg.Record]
) -> None:
    """A write that expects another offset than the watermark's changes nothing; the right one goes on."""
    await writer.open_partition(3)
    await writer.write(3, 0, make_batch(("a", make_commit(1))), 10)

    for wrong in (0, 9, 11):
        with pytest.raises(PartitionFenced, match="partition 3"):
            await writer.write(3, wrong, make_batch(("b", make_commit(2))), 20)

    assert await counts(analyst) == (1, 1)
    assert await writer.open_partition(3) == 10
    await writer.write(3, 10, make_batch(("b", make_commit(2))), 20)
    assert await counts(analyst) == (2, 2)


async def test_an_unopened_partition_is_fenced(
    writer: ProjectionWriter, analyst: asyncpg.Connection[asyncpg.Record]
) -> None:
    """Without watermark rows there is nothing to compare with, so nothing is written."""
    with pytest.raises(PartitionFenced):
        await writer.write(3, 0, make_batch(("a", make_commit(1))), 1)

    assert await counts(analyst) == (0, 0)


async def test_a_failure_in_the_middle_leaves_nothing(
    writer: ProjectionWriter, analyst: asyncpg.Connection[asyncpg.Record]
) -> None:
    """A statement that fails after the watermarks have moved takes everything back with it."""
    await writer.open_partition(3)
    poison = make_batch(("a", make_commit(1)), ("b", make_commit(2, metadata=b"{no json")))

    with pytest.raises(RowsRefused, match=r"^invalid input syntax for type json$"):
        await writer.write(3, 0, poison, 10)

    assert await counts(analyst) == (0, 0)
    assert await writer.open_partition(3) == 0
    await writer.write(3, 0, make_batch(("a", make_commit(1))), 10)
    assert await counts(analyst) == (1, 1)


async def test_a_connection_cut_before_the_commit_leaves_nothing(
    writer: ProjectionWriter, analyst: asyncpg.Connection[asyncpg.Record], database: str
) -> None:
    """A server that ends the connection after the COPY leaves neither rows nor a moved watermark."""
    await writer.open_partition(3)
    holder = await asyncpg.connect(database)
    async with holder.transaction():
        await holder.fetch("SELECT FROM stampline.watermarks FOR UPDATE")
        writing = asyncio.create_task(writer.write(3, 0, make_batch(("a", make_commit(1))), 10))
        pid = await wait_until_blocked(analyst, "UPDATE stampline.watermarks")
        await analyst.fetchval("SELECT pg_terminate_backend($1)", pid)
        with pytest.raises(ServiceUnavailable):
            await writing
    await holder.close()

    assert await counts(analyst) == (0, 0)
    await writer.write(3, 0, make_batch(("a", make_commit(1))), 10)
    assert await counts(analyst) == (1, 1)


async def test_a_cancelled_write_leaves_nothing(
    writer: ProjectionWriter, analyst: asyncpg.Connection[asyncpg.Record], database: str
) -> None:
    """A write that is given up (its partition is revoked) is rolled back, and its connection serves the next one."""
    await writer.open_partition(3)
    holder = await asyncpg.connect(database)
    async with holder.transaction():
        await holder.fetch("SELECT FROM stampline.watermarks FOR UPDATE")
        writing = asyncio.create_task(writer.write(3, 0, make_batch(("a", make_commit(1))), 10))
        await wait_until_blocked(analyst, "UPDATE stampline.watermarks")
        writing.cancel()
        with pytest.raises(asyncio.CancelledError):
            await writing
    await holder.close()

    assert await counts(analyst) == (0, 0)
    await writer.write(3, 0, make_batch(("a", make_commit(1))), 10)
    assert await counts(analyst) == (1, 1)


async def test_a_writer_stuck_in_its_copy_does_not_hold_the_watermark(
    writer: ProjectionWriter, analyst: asyncpg.Connection[asyncpg.Record], database: str
) -> None:
    """PostgreSQL waits for a frozen client's COPY for ever, so a successor must not need a lock that it holds."""
    await writer.open_partition(3)
    holder = await asyncpg.connect(database)
    async with holder.transaction():
        # A lock that lets nobody write the history: the COPY waits for it, as it would for data.
        await holder.execute("LOCK TABLE stampline.file_history IN SHARE MODE")
        writing = asyncio.create_task(writer.write(3, 0, make_batch(("a", make_commit(1))), 10))
        await wait_until_blocked(analyst, "COPY")
        locked = await analyst.fetch("SELECT FROM stampline.watermarks FOR UPDATE NOWAIT")
    await writing
    await holder.close()

    assert len(locked) == len(PROJECTIONS)


async def test_exactly_one_of_two_writers_wins(
    settings: Settings, writer: ProjectionWriter, analyst: asyncpg.Connection[asyncpg.Record]
) -> None:
    """Two projectors that write the same piece of the feed at the same time: one commits, the other is fenced."""
    async with PostgresConnectionManager(settings) as manager:
        rival = ProjectionWriter(manager, "two")
        await writer.open_partition(3)
        await rival.open_partition(3)
        for begin in range(0, 100, 10):
            batch = make_batch(*((f"f{n % 7}", make_commit(n)) for n in range(begin, begin + 10)))
            results = await asyncio.gather(
                *(each.write(3, begin, batch, begin + 10) for each in (writer, rival)), return_exceptions=True
            )
            assert {type(result) for result in results} == {WriteResult, PartitionFenced}

    assert await counts(analyst) == (7, 100)


async def test_a_zombie_that_comes_back_is_refused(
    writer: ProjectionWriter, manager: PostgresConnectionManager, analyst: asyncpg.Connection[asyncpg.Record]
) -> None:
    """A projector that slept while another took over writes nothing, wherever it believes to stand."""
    zombie, owner = writer, ProjectionWriter(manager, "two")
    await zombie.open_partition(3)
    await zombie.write(3, 0, make_batch(("a", make_commit(1))), 10)
    assert await owner.open_partition(3) == 10
    await owner.write(3, 10, make_batch(("a", make_commit(2, version=2)), ("b", make_commit(3))), 20)

    with pytest.raises(PartitionFenced, match="partition 3"):
        await zombie.write(3, 10, make_batch(("a", make_commit(2, version=2)), ("z", make_commit(4))), 30)

    assert [tuple(row) for row in await analyst.fetch(INPUTS)] == [("a", 1), ("a", 2), ("b", 3)]
    assert {tuple(row)[1:] for row in await analyst.fetch(WATERMARKS)} == {(20, 4, instant(3), "two")}


async def test_a_zombie_in_the_middle_of_its_transaction_is_refused(
    writer: ProjectionWriter,
    manager: PostgresConnectionManager,
    analyst: asyncpg.Connection[asyncpg.Record],
    database: str,
) -> None:
    """A zombie that has copied its rows waits for the owner's watermark, and finds it moved when the owner commits."""
    zombie, owner = writer, ProjectionWriter(manager, "two")
    await zombie.open_partition(3)
    await zombie.write(3, 0, make_batch(("a", make_commit(1))), 10)
    await owner.open_partition(3)
    holder = await asyncpg.connect(database)
    async with holder.transaction():
        await holder.fetch("SELECT FROM stampline.files FOR UPDATE")
        # The owner has moved the watermark and waits for the row of `a`; the zombie waits for the watermark.
        owning = asyncio.create_task(owner.write(3, 10, make_batch(("a", make_commit(2, version=2))), 20))
        await wait_until_blocked(analyst, "INSERT INTO stampline.files")
        haunting = asyncio.create_task(zombie.write(3, 10, make_batch(("z", make_commit(5))), 30))
        await wait_until_blocked(analyst, "UPDATE stampline.watermarks")
    await owning
    with pytest.raises(PartitionFenced):
        await haunting
    await holder.close()

    assert [tuple(row) for row in await analyst.fetch(INPUTS)] == [("a", 1), ("a", 2)]
    assert await analyst.fetchval("SELECT array_agg(uri) FROM files") == ["a"]
    assert {tuple(row)[1:] for row in await analyst.fetch(WATERMARKS)} == {(20, 3, instant(2), "two")}


async def test_partitions_do_not_disturb_each_other(
    settings: Settings, writer: ProjectionWriter, analyst: asyncpg.Connection[asyncpg.Record]
) -> None:
    """Each partition has its own watermarks; even the same files and contents in several partitions never deadlock."""

    async def project(partition: int) -> None:
        draw = random.Random(partition)
        offset = await writer.open_partition(partition)
        for _ in range(5):
            uris = draw.sample(range(500), 300)
            batch = make_batch(*((f"f{uri}", make_commit(offset + n)) for n, uri in enumerate(uris)))
            await writer.write(partition, offset, batch, offset + 300)
            offset += 300

    await asyncio.gather(*(project(partition) for partition in range(4)))

    assert await counts(analyst) == (500, 4 * 5 * 300)


@pytest.mark.parametrize("seed", range(3))
async def test_the_cut_of_the_batches_does_not_matter(
    writer: ProjectionWriter, analyst: asyncpg.Connection[asyncpg.Record], seed: int
) -> None:
    """A feed written in any pieces leaves the same files and the same history as in one piece."""
    feed = make_feed(seed)
    draw = random.Random(seed)
    edges = sorted({0, len(feed), *(draw.randrange(1, len(feed)) for _ in range(8))})
    pieces = {3: edges, 4: [0, len(feed)]}
    shown = {}
    for partition, cuts in pieces.items():
        await writer.open_partition(partition)
        for begin, end in itertools.pairwise(cuts):
            await writer.write(partition, begin, make_batch(*feed[begin:end]), end)
        shown[partition] = [
            [tuple(row) for row in await analyst.fetch(f"SELECT {columns} FROM {view} ORDER BY 1, 2")]  # noqa: S608
            for view, columns in (
                ("files", "uri, version, digest, size, deleted, event_id, input_offset"),
                (f"file_history WHERE input_partition = {partition}", "input_offset, uri, outcome, version, digest"),
            )
        ]
        await analyst.execute("DELETE FROM stampline.files")

    assert shown[3] == shown[4]


async def test_a_repeated_state_leaves_the_row_alone(
    writer: ProjectionWriter, analyst: asyncpg.Connection[asyncpg.Record]
) -> None:
    """A duplicate of what is shown already adds to the history and does not touch the file's row."""
    await writer.open_partition(3)
    await writer.write(3, 0, make_batch(("a", make_commit(1))), 1)
    first = await analyst.fetchval("SELECT projected_at FROM files")
    result = await writer.write(3, 1, make_batch(("a", make_refusal(2, make_state(1), outcome="duplicate"))), 2)

    assert result.rows == {"files": 0, "file_history": 1, "contents": 0, "activity": 1}
    assert await analyst.fetchval("SELECT projected_at FROM files") == first


async def test_projections_that_stand_apart_are_refused(
    writer: ProjectionWriter, analyst: asyncpg.Connection[asyncpg.Record]
) -> None:
    """A partition whose projections disagree is not opened, and the message says what to run."""
    await writer.open_partition(3)
    await analyst.execute("UPDATE stampline.watermarks SET feed_offset = 7 WHERE projection = 'files'")

    with pytest.raises(PositionLost, match="file_history was changed by hand"):
        await writer.open_partition(3)


async def test_a_new_month_gets_its_partition(manager: PostgresConnectionManager, database: str) -> None:
    """The history goes on at midnight of the last day: the month is made when the writer first meets it."""
    moments = [datetime(2031, 12, 31, 23, 59, 59, tzinfo=UTC), datetime(2032, 2, 1, tzinfo=UTC)]
    clock = iter([moments[0], moments[0], moments[1]])
    writer = ProjectionWriter(manager, "one", now=lambda: next(clock))
    await writer.open_partition(3)
    await writer.write(3, 0, make_batch(("a", make_commit(1))), 1)
    await writer.write(3, 1, make_batch(("a", make_commit(2, version=2))), 2)

    async with manager.connection() as connection:
        tables = await connection.fetch("SELECT tableoid::regclass::text FROM stampline.file_history ORDER BY 1")
    assert [row[0] for row in tables] == ["stampline.file_history_2031_12", "stampline.file_history_2032_02"]


async def test_the_longest_uri_can_be_shown_and_found(
    writer: ProjectionWriter, analyst: asyncpg.Connection[asyncpg.Record]
) -> None:
    """A uri of 4,096 bytes that does not compress is stored, and is found by an index through both views."""
    draw = random.Random(1)
    uri = "x" + "".join(chr(draw.randrange(0x4E00, 0x9FFF)) for _ in range(1365))
    assert len(uri.encode()) == 4096
    await writer.open_partition(3)
    await writer.write(3, 0, make_batch((uri, make_commit(1)), ("b", make_commit(2))), 1)

    await analyst.execute("SET enable_seqscan = off")
    for view in ("files", "file_history"):
        assert await analyst.fetchval(f"SELECT count(*) FROM {view} WHERE uri = $1", uri) == 1  # noqa: S608
        plan = await analyst.fetch(f"EXPLAIN SELECT FROM {view} WHERE uri = 'b'")
        assert "uri" in "".join(row[0] for row in plan if "Index" in row[0])


async def test_a_failed_first_write_leaves_the_session_usable(
    writer: ProjectionWriter, analyst: asyncpg.Connection[asyncpg.Record]
) -> None:
    """The session's staging tables are made in a transaction; where that is rolled back, the next one makes them."""
    await writer.open_partition(3)
    with pytest.raises(PartitionFenced):
        await writer.write(3, 5, make_batch(("a", make_commit(1))), 6)
    for offset in range(8):
        await writer.write(3, offset, make_batch((f"f{offset}", make_commit(offset))), offset + 1)

    assert await counts(analyst) == (8, 8)


def test_samples_are_what_the_feed_gives() -> None:
    """The batches of these tests are what `decode_feed` makes of encoded records."""
    pairs = [("a", make_commit(1)), ("b", make_refusal(2, None))]

    assert isinstance(decode_feed([]), FeedBatch)
    assert decode_feed(make_records(*pairs)) == make_batch(*pairs)
    assert instant(0) == NOON
