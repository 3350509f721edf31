"""A swap is not noticed by anybody who reads or writes, and there is a way back."""

from __future__ import annotations

import asyncio
import json
import re
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import asyncpg
import pytest

from pipeline.client import Position
from pipeline.errors import StamplineError
from pipeline.postgres import PostgresConnectionManager
from pipeline.topics import create_topics
from pipeline.verify import all_faults, verify
from projections.comparison import rebuild
from projections.copies import REBUILDABLE
from projections.storage import OLD
from projections.swap import drop_copy, roll_back, swap
from tests.fix_road import Road, environment, make_events
from tests.fix_services import MakeSettings
from tests.rebuild_samples import PARTITIONS, Site, make_changelog

pytestmark = pytest.mark.integration

every_projection = pytest.mark.parametrize("name", REBUILDABLE)

#: What a reader asks for, each answer of one row: it must never fail, and no number may fall.
QUESTIONS = {
    "files": "SELECT count(*) FROM files",
    "file_history": "SELECT count(*) FROM file_history",
    "contents": "SELECT count(*) FROM contents",
    "activity": "SELECT sum(events) FROM activity",
    "a user's own view": "SELECT count(*) FROM mine",
    "two views at once": "SELECT count(*) FROM file_history JOIN files USING (uri)",
    "wait_for": "SELECT count(wait_for('file-events:0:0', interval '0'))",
}


@pytest.fixture
async def site(make_settings: MakeSettings) -> AsyncIterator[Site]:
    """A deployment of four partitions with a projected feed, without any node."""
    settings = make_settings(kafka_topic_partitions=PARTITIONS)
    await create_topics(settings)
    async with PostgresConnectionManager(settings) as manager:
        site = Site(settings, manager)
        await site.fill(300)
        yield site


async def rebuild_and_swap(site: Site, name: str, **options: Any) -> float:
    """Rebuild and swap without asking; return how long projectors had to wait, in ms."""
    await rebuild(site.settings, site.manager, name)
    result = await swap(site.settings, site.manager, name, accept=lambda _comparison: True, **options)
    assert result.held_ms is not None
    return result.held_ms


async def test_views_of_users_go_on(site: Site) -> None:
    """A user's view on ours, and one on the table itself, show the new rows; grants and options stay."""
    await site.fetch("CREATE VIEW mine AS SELECT uri, size FROM files WHERE size > 0")
    await site.fetch("CREATE VIEW direct WITH (security_barrier) AS SELECT uri FROM stampline.files")
    grants = (
        "SELECT relname::text, relacl::text, reloptions FROM pg_class WHERE relname IN ('files', 'mine', 'direct') "
    )
    grants += "AND relkind = 'v' ORDER BY oid"
    before = await site.fetch(grants)
    await site.fetch("DELETE FROM stampline.files")
    assert await site.fetch("SELECT count(*) FROM mine") == [(0,)]
    await rebuild_and_swap(site, "files")

    assert (await site.fetch("SELECT count(*) > 0 FROM mine")) == [(True,)]
    assert await site.fetch("SELECT count(*) FROM direct") == await site.fetch("SELECT count(*) FROM stampline.files")
    assert await site.fetch(grants) == before
    assert ("stampline_reader=r" in str(before), ["security_barrier=true"] in [row[2] for row in before]) == (
        True,
        True,
    )
    await drop_copy(site.manager, "files", OLD)


async def test_a_materialized_view_on_the_table_is_told(site: Site) -> None:
    """What cannot follow the table is named, and nothing is changed."""
    await site.fetch("CREATE MATERIALIZED VIEW fixed AS SELECT uri FROM stampline.files")
    before = await site.tables()

    with pytest.raises(StamplineError, match=r"materialized view public\.fixed stands on the table stampline\.files"):
        await rebuild_and_swap(site, "files")
    assert await site.tables() == before


@every_projection
async def test_there_is_a_way_back(site: Site, name: str) -> None:
    """A rollback brings the old table up to date and puts it back; what was live is then the old one."""
    await rebuild_and_swap(site, name)
    oids = f"SELECT 'stampline.{name}'::regclass::oid, 'stampline_old.{name}'::regclass::oid"
    ((new, old),) = await site.fetch(oids)
    for partition in range(PARTITIONS):
        await site.produce(partition, make_changelog(partition, 500)[len(make_changelog(partition, 300)) :])
    await site.project()
    before = await site.tables()
    result = await roll_back(site.settings, site.manager, name)

    assert result.held_ms is not None
    assert await site.fetch(oids) == [(old, new)]
    times = {"files": 5, "file_history": 5}
    for table, rows in (await site.tables()).items():
        place = times.get(table)
        assert [row for row in rows if place is None] == [row for row in before[table] if place is None]
        assert len(rows) == len(before[table])
    assert (await rebuild(site.settings, site.manager, name)).equal

    with pytest.raises(StamplineError, match=f"run `stampline projections cancel {name}`"):
        await roll_back(site.settings, site.manager, name)
    with pytest.raises(StamplineError, match=f"run `stampline projections drop-old {name}`"):
        await swap(site.settings, site.manager, name, accept=lambda _comparison: True)
    await drop_copy(site.manager, name, OLD)
    assert await site.fetch(f"SELECT to_regclass('stampline_old.{name}')") == [(None,)]
    assert await site.fetch("SELECT * FROM stampline_old.watermarks") == []


async def test_statements_of_a_session_find_the_new_table(site: Site) -> None:
    """Statements and functions that a session has prepared before a swap use the new table after it."""
    statements = [
        "SELECT count(*) FROM files",
        "SELECT count(*) FROM file_history",
        "SELECT stampline.answer(0, 5)",
        "SELECT count(*) FROM stampline.drop_history_before(now() - interval '1 year')",
        "SELECT stampline.ensure_history_partitions(now())",
    ]
    connection = await asyncpg.connect(site.settings.postgres_url)
    try:
        # More often than PostgreSQL plans anew for each call.
        before = [[await connection.fetchval(text) for text in statements] for _ in range(7)][-1]
        for name in ("files", "file_history"):
            await rebuild_and_swap(site, name)
            await drop_copy(site.manager, name, OLD)
        assert [await connection.fetchval(text) for text in statements] == before

        await connection.execute("SELECT stampline.ensure_history_partitions(now() + interval '100 days')")
        partitions = "SELECT count(*) FROM pg_inherits WHERE inhparent = 'stampline.file_history'::regclass"
        assert await connection.fetchval(partitions) == 4
        dropped = await connection.fetch("SELECT stampline.drop_history_before(now() + interval '1 year')")
        assert len(dropped) == 4
        assert await connection.fetchval(statements[1]) == 0
    finally:
        await connection.close()


async def test_who_is_in_the_way_is_named(site: Site) -> None:
    """A transaction that goes on holding the table is named, with what to do; nothing has changed, and the projector is
    not held up by it.
    """
    await rebuild(site.settings, site.manager, "files")
    before = await site.tables()
    analyst = await asyncpg.connect(site.settings.postgres_url, server_settings={"application_name": "spreadsheet"})
    try:
        async with analyst.transaction():
            await analyst.fetch("SELECT FROM files LIMIT 1")
            pid = analyst.get_server_pid()
            with pytest.raises(
                StamplineError, match=rf"in use for 2 s by process {pid} \(spreadsheet, .*idle in trans"
            ):
                await swap(site.settings, site.manager, "files", accept=bool, patience_seconds=2)
        assert await site.tables() == before
        assert await rebuild_and_swap(site, "files") < 5000
    finally:
        await analyst.close()


async def test_a_refusal_is_one_line_and_changes_nothing(site: Site) -> None:
    """What cannot be done is said in one line, with an exit code that is not 0, and nothing is changed."""
    before = await site.tables()
    # One after the other: of two that are at the same projection, one is told about the other.
    done = [
        await command(site, *arguments)
        for arguments in (
            ("rebuild", "nothing"),
            ("rebuild", "dead_letters"),
            ("swap", "files"),
            ("rollback", "files"),
            ("cancel", "files", "--yes"),
            ("drop-old", "files", "--yes"),
        )
    ]

    assert [code for code, _, _ in done] == [2, 1, 1, 1, 1, 1]
    assert "is not one of 'files', 'file_history', 'contents', 'activity', 'dead_letters'" in done[0][2]
    wanted = [
        "its topic is read anew",
        "projections rebuild files` first",
        "no old table",
        "no rebuild",
        "no old table",
    ]
    for text, (_, out, err) in zip(wanted, done[1:], strict=True):
        assert out == ""
        (line,) = err.strip().splitlines()
        assert re.match(f"stampline: .*{text}", line), line
    assert await site.tables() == before


async def test_the_commands_tell_what_they_do(site: Site) -> None:
    """Results are JSON on standard output; a difference is exit code 3, and not put in place unless it is accepted."""
    await site.fetch("DELETE FROM stampline.activity WHERE input_partition = 1")
    code, out, err = await command(site, "rebuild", "activity", "--json")
    told = json.loads(out)

    assert (code, told["equal"], "differs from what is live" in err) == (3, False, True)
    assert [item["partition"] for item in told["partitions"] if not item["equal"]] == [1]
    listed = {item["projection"]: item for item in json.loads((await command(site, "list", "--json"))[1])}
    assert (listed["activity"]["shadow_percent"], listed["files"]["shadow_percent"]) == (100.0, None)
    code, out, err = await command(site, "swap", "activity", "--json")
    assert (code, json.loads(out)["swapped"], "--accept-differences" in err) == (3, False, True)
    code, out, err = await command(site, "swap", "activity", "--accept-differences", "--json")
    assert (code, json.loads(out)["swapped"]) == (0, True), err
    assert (await command(site, "rebuild", "activity", "--no-progress"))[0] == 0
    code, out, err = await command(site, "swap", "activity", "--drop-old")
    assert (code, "activity is exchanged" in err) == (0, True), err
    assert (await command(site, "rollback", "activity"))[0] == 0
    assert "live until" in (await command(site, "list"))[1].replace("\n", " ")
    assert (await command(site, "drop-old", "activity", "--yes"))[0] == 0


async def command(site: Site, *arguments: str) -> tuple[int | None, str, str]:
    """Run `stampline projections` to its end."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "pipeline", "projections", *arguments),
        cwd=Path(__file__).parents[2],
        env=environment(site.settings),
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    out, err = await process.communicate()
    return process.returncode, out.decode(), err.decode()


async def test_nobody_notices_a_swap(road: Road) -> None:
    """While events flow, every projection is rebuilt, swapped and rolled back: no read fails, no number falls, and in
    the end every event is there exactly once.
    """
    road.start("hasher", "reducer")
    road.start("projector")
    events = make_events(20_000, 500, seed=1)
    positions = await road.send(events[:4000])
    await road.until_visible(positions)
    await road.fetch("CREATE VIEW mine AS SELECT uri, digest FROM files")
    ended = asyncio.Event()
    answers: dict[str, list[int]] = {name: [] for name in QUESTIONS}

    async def load() -> list[Position]:
        sent: list[Position] = []
        while not ended.is_set() or not sent:
            begin = 4000 + len(sent)
            sent += await road.send(events[begin : begin + 50])
            if begin + 50 >= len(events):
                break
        return sent

    async def read(name: str) -> None:
        connection = await asyncpg.connect(road.settings.postgres_url)
        try:
            while not ended.is_set():
                answers[name].append(await connection.fetchval(QUESTIONS[name]))
        finally:
            await connection.close()

    async def exchange() -> None:
        try:
            async with PostgresConnectionManager(road.settings) as manager:
                for name in REBUILDABLE:
                    assert (await rebuild(road.settings, manager, name)).equal
                    result = await swap(road.settings, manager, name, accept=lambda _comparison: False)
                    assert result.held_ms is not None
                    assert (await roll_back(road.settings, manager, name)).held_ms is not None
        finally:
            ended.set()

    sending = asyncio.create_task(load())
    await asyncio.gather(exchange(), *(read(name) for name in QUESTIONS))
    positions += await sending
    await road.until_visible(positions)

    assert {name: told == sorted(told) for name, told in answers.items()} == dict.fromkeys(QUESTIONS, True)
    assert min(len(told) for told in answers.values()) > 10
    await road.assert_exact(events[: len(positions)], positions)
    assert all_faults(await verify(road.settings)) == []
