"""A rebuild makes the same rows from the feed, beside the live ones, however it is disturbed."""

from __future__ import annotations

import asyncio
import gc
import random
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta

import pytest
from msgspec.structs import replace

from pipeline.errors import StamplineError
from pipeline.events import Before, encode_record
from pipeline.postgres import PostgresConnectionManager
from pipeline.topics import create_topics
from projections import copies, rebuild
from projections.comparison import Comparison
from projections.comparison import rebuild as rebuild_projection
from projections.copies import REBUILDABLE
from projections.feed import decode_feed
from projections.rebuild import Tally
from projections.storage import SHADOW
from projections.swap import drop_copy, swap
from tests.fix_road import Road
from tests.fix_services import MakeSettings
from tests.projection_samples import Record, make_commit, make_records
from tests.rebuild_samples import PARTITIONS, Site, make_changelog

pytestmark = pytest.mark.integration

every_projection = pytest.mark.parametrize("name", REBUILDABLE)

DAMAGE = {
    "files": "DELETE FROM stampline.files WHERE input_partition = 2 AND get_byte(uuid_send(uri_key), 0) < 128",
    "file_history": "UPDATE stampline.file_history SET outcome = 'unchanged', size = 7 WHERE input_partition = 2 "
    "AND input_offset BETWEEN 100 AND 200",
    "contents": "UPDATE stampline.contents SET copies = copies + 1, last_seen_at = now() WHERE size < 3000",
    "activity": "UPDATE stampline.activity SET events = events * 2 WHERE input_partition = 2",
}


@pytest.fixture
async def site(make_settings: MakeSettings) -> AsyncIterator[Site]:
    """A deployment of four partitions without any node."""
    settings = make_settings(kafka_topic_partitions=PARTITIONS)
    await create_topics(settings)
    async with PostgresConnectionManager(settings) as manager:
        yield Site(settings, manager)


async def make(site: Site, name: str) -> Comparison:
    """Rebuild a projection."""
    return await rebuild_projection(site.settings, site.manager, name)


async def put_in_place(site: Site, name: str) -> None:
    """Swap without asking."""
    result = await swap(site.settings, site.manager, name, accept=lambda _comparison: True, drop_old=True)
    assert result.held_ms is not None


@every_projection
async def test_a_rebuilt_projection_is_the_live_one_again(site: Site, name: str) -> None:
    """Rebuilt and swapped, every row is as it was, the time of its projection too, and the projector goes on."""
    await site.fill()
    before = await site.tables()
    comparison = await make(site, name)

    assert comparison.equal
    assert sum(item.live_rows for item in comparison.partitions) == len(before[name])
    assert (comparison.tally.copied, comparison.tally.refused) == (0, 0)
    await put_in_place(site, name)
    assert await site.tables() == before

    for partition in range(PARTITIONS):
        await site.produce(partition, make_changelog(partition, 900)[len(make_changelog(partition, 600)) :])
    await site.project()
    await site.fetch("SELECT stampline.ensure_history_partitions(now() + interval '40 days')")
    assert (await make(site, name)).equal


@every_projection
async def test_a_damaged_table_is_told_and_repaired(site: Site, name: str) -> None:
    """Rows that were changed by hand are found, in the partition where they are, and a swap brings the right ones."""
    await site.fill()
    before = await site.tables()
    await site.fetch(DAMAGE[name])
    comparison = await make(site, name)

    wrong = [None] if name == "contents" else [2]
    assert [item.partition for item in comparison.partitions if not item.equal] == wrong
    refused = await swap(site.settings, site.manager, name, accept=lambda _comparison: False)
    assert refused.held_ms is None
    assert await site.tables() != before
    await put_in_place(site, name)
    assert without_times(await site.tables()) == without_times(before)
    assert (await make(site, name)).equal


def without_times(tables: dict[str, list[tuple[object, ...]]]) -> dict[str, list[tuple[object, ...]]]:
    """Leave out when the rows were projected: of a row that was gone nobody knows that any more."""
    return {**tables, "files": [row[:5] + row[6:] for row in tables["files"]]}


@every_projection
async def test_what_compaction_has_taken_comes_from_the_live_tables(site: Site, name: str) -> None:
    """Of a compacted feed every projection is made whole, and the histories tell how many changes they copied."""
    taken = await site.fill_compacted()
    before = await site.tables()
    comparison = await make(site, name)

    assert taken > 1000
    assert comparison.tally.copied == (taken if name in {"file_history", "activity"} else 0)
    assert comparison.equal
    await put_in_place(site, name)
    assert await site.tables() == before


async def test_contents_survive_a_cleaner_that_works_during_the_rebuild(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A change whose predecessor was compacted after the one before was read does not leave a copy behind."""
    monkeypatch.setattr(rebuild, "BATCH_RECORDS", 1)
    first, second, third = (make_commit(offset, version=offset + 1) for offset in range(3))
    second = replace(second, before=Before(bytes([0]) * 32, 100, deleted=False))
    third = replace(third, before=Before(bytes([1]) * 32, 101, deleted=False))
    await site.produce(0, [Record(b"a", encode_record(change), 0) for change in (first, third)])
    for partition in range(PARTITIONS):
        await site.writer.open_partition(partition)
    await site.writer.write(0, 0, decode_feed(make_records(("a", first), ("a", second), ("a", third))), 2)
    before = await site.tables()
    comparison = await make(site, "contents")

    assert [row[1] for row in before["contents"]] == [0, 0, 1]
    assert comparison.equal
    await put_in_place(site, "contents")
    assert await site.tables() == before


@every_projection
async def test_history_that_was_dropped_by_age_stays_dropped(site: Site, name: str) -> None:
    """A rebuild brings nothing back that retention has dropped, and loses no number that was counted from it."""
    site.now = datetime.now(UTC) - timedelta(days=100)
    for partition in range(PARTITIONS):
        await site.produce(partition, make_changelog(partition, 600)[:300])
    await site.project()
    site.now = datetime.now(UTC)
    for partition in range(PARTITIONS):
        await site.produce(partition, make_changelog(partition, 600)[300:])
    await site.project()
    dropped = await site.fetch("SELECT stampline.drop_history_before(now() - interval '40 days')")
    before = await site.tables()
    comparison = await make(site, name)

    assert dropped
    assert comparison.equal
    await put_in_place(site, name)
    assert await site.tables() == before
    assert await site.fetch("SELECT stampline.drop_history_before(now() - interval '40 days')") == []


async def test_history_may_be_dropped_in_the_middle_of_a_rebuild(site: Site) -> None:
    """What retention drops after a rebuild has copied it is dropped from the rebuilt table too, and stays so."""
    site.now = datetime.now(UTC) - timedelta(days=100)
    for partition in range(PARTITIONS):
        await site.produce(partition, make_changelog(partition, 300))
    await site.project()
    site.now = datetime.now(UTC)
    assert (await make(site, "file_history")).equal

    await site.fetch("SELECT stampline.drop_history_before(now() - interval '40 days')")
    assert (await make(site, "file_history")).equal
    await put_in_place(site, "file_history")
    assert await site.fetch("SELECT * FROM file_history") == []


# aiokafka leaves a connection behind that is cancelled while it is made; a process that was cancelled ends then.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@every_projection
async def test_a_rebuild_may_end_at_any_moment(site: Site, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Cancelled again and again at random places, a rebuild goes on each time and comes to the same rows."""
    monkeypatch.setattr(rebuild, "BATCH_RECORDS", 50)
    await site.fill()
    draw = random.Random(name)
    cancelled, longest_seconds = 0, 0.01  # A rebuild takes longer, so the first ones are cancelled surely.
    while True:
        task = asyncio.create_task(make(site, name))
        done, _ = await asyncio.wait({task}, timeout=draw.uniform(0, longest_seconds))
        if done:
            break
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        cancelled += 1
        longest_seconds *= 1.15
    comparison = task.result()
    gc.collect()

    assert cancelled > 2
    assert comparison.equal


async def test_a_rebuild_that_was_killed_goes_on(site: Site, tmp_path_factory: pytest.TempPathFactory) -> None:
    """After kill -9 the shadow holds whole batches only, and the next call reads just what is left."""
    await site.fill(6000, uris=4000)
    road = Road(site.settings, tmp_path_factory.mktemp("killed"))
    node = road.launch("pipeline", "projections", "rebuild", "contents")
    position = "SELECT coalesce(sum(feed_offset), 0)::bigint FROM stampline_shadow.watermarks"

    async def begun() -> bool:
        return bool((await site.fetch(position))[0][0])

    await road.until(begun)
    node.kill()
    read = (await site.fetch(position))[0][0]
    total = (await site.fetch("SELECT sum(feed_offset)::bigint FROM stampline.watermarks WHERE projection = 'files'"))[
        0
    ][0]
    comparison = await make(site, "contents")

    assert 0 < read < total
    assert comparison.tally.read <= total - read
    assert comparison.equal


async def test_what_postgres_refuses_is_left_out(site: Site) -> None:
    """Records that PostgreSQL refused of the live projector are refused of a rebuild too, which tells how many."""
    for partition in range(PARTITIONS):
        await site.writer.open_partition(partition)
    await site.fetch("ALTER TABLE stampline.files ADD CONSTRAINT no_poison CHECK (uri NOT LIKE '%poison%')")
    changes = [
        (f"file:///{'poison' if number in {30, 31, 80} else 'good'}/{number}", make_commit(number))
        for number in range(100)
    ]
    await site.produce(1, make_records(*changes))
    good = make_records(*(item for item in changes if "poison" not in item[0]))
    await site.writer.write(1, 0, decode_feed(good), 100)
    comparison = await make(site, "files")

    assert comparison.tally.refused == 3
    assert comparison.equal


async def test_only_one_works_on_a_projection(site: Site) -> None:
    """A second command on the same projection is told so; one on another projection is not in its way."""
    await site.fill(60)
    async with copies.guarded(site.manager, "files"):
        with pytest.raises(StamplineError, match="another `stampline projections` command is working on files"):
            await make(site, "files")
        with pytest.raises(StamplineError, match="is working on files"):
            await drop_copy(site.manager, "files", SHADOW)
        assert (await make(site, "contents")).equal
    assert (await make(site, "files")).equal


async def test_a_rebuild_that_is_cancelled_leaves_nothing(site: Site) -> None:
    """Cancelled, nothing of a rebuild is left, and the next one begins anew; progress tells each batch."""
    await site.fill(60)
    told: list[int] = []

    def report(tally: Tally) -> None:
        told.append(tally.read)

    for name in REBUILDABLE:
        await rebuild_projection(site.settings, site.manager, name, report)
        await drop_copy(site.manager, name, SHADOW)

    assert told == sorted(told[: len(told) // 4]) * 4
    left = "SELECT tablename::text FROM pg_tables WHERE schemaname = 'stampline_shadow'"
    assert await site.fetch(left) == [("watermarks",)]
    assert await site.fetch("SELECT * FROM stampline_shadow.watermarks") == []
    with pytest.raises(StamplineError, match="there is no rebuild of files"):
        await drop_copy(site.manager, "files", SHADOW)


async def test_a_shadow_of_another_shape_is_not_used(site: Site) -> None:
    """After a migration changed the live table, a shadow from before is refused, with what to do."""
    await site.fill(60)
    await make(site, "files")
    await site.fetch("ALTER TABLE stampline.files ADD COLUMN added text")

    with pytest.raises(StamplineError, match="run `stampline projections cancel files`"):
        await make(site, "files")
