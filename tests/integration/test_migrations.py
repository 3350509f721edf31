"""The migrations, against a real server."""

from __future__ import annotations

import asyncio
import shutil
import uuid
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import asyncpg
import pytest
from alembic import command
from sqlalchemy import Connection

import migrations.run
from migrations.run import current, downgrade, head, revision, upgrade
from migrations.schema import metadata
from pipeline.errors import ServiceUnavailable, SettingsError
from tests.fix_services import SharedServices, with_database

pytestmark = pytest.mark.integration

VIEWS = {
    "files": "uri, namespace, digest, size, version, op, deleted, occurred_at, stamped_at, projected_at, event_id, "
    "workflow_id, metadata, input_partition, input_offset",
    "file_history": "input_partition, input_offset, uri, namespace, event_id, op, outcome, version, digest, size, "
    "occurred_at, recorded_at, projected_at, reason",
    "contents": "digest, size, copies, bytes, first_seen_at, last_seen_at",
    "duplicates": "digest, size, copies, wasted_bytes, uris",
    "activity": "minute, namespace, op, events, bytes, committed, unchanged, duplicate, conflict, deferred, gave_up, "
    "rejected",
    "dead_letters": "topic, partition, offset, reason, error, key, payload, headers, dead_at, status, attempts",
    "projection_watermarks": "projection, partition, feed_offset, input_offset, event_time, updated_at, heartbeat_at, "
    "owner",
    "projection_lag": "projection, partition, rows_behind, lag_ms, heartbeat_age_ms, status",
}

# What a table looks like to PostgreSQL: its columns, constraints, indexes, storage and how it is partitioned.
SHAPE = """
SELECT relation.relname, relation.relkind, relation.reloptions, pg_get_partkeydef(relation.oid) AS partitioned,
    (SELECT array_agg(format('%s %s %s', attname, format_type(atttypid, atttypmod), attnotnull) ORDER BY attnum)
     FROM pg_attribute WHERE attrelid = relation.oid AND attnum > 0) AS columns,
    (SELECT array_agg(conname || ' ' || pg_get_constraintdef(oid) ORDER BY conname)
     FROM pg_constraint WHERE conrelid = relation.oid AND contype <> 'n') AS constraints,
    (SELECT array_agg(indexdef ORDER BY indexdef)
     FROM pg_indexes WHERE schemaname = 'stampline' AND tablename = relation.relname) AS indexes
FROM pg_class AS relation
WHERE relnamespace = 'stampline'::regnamespace AND relkind IN ('r', 'p') AND NOT relispartition
    AND relname <> 'alembic_version'
ORDER BY relname
"""


@pytest.fixture
async def empty_database(services: SharedServices) -> AsyncIterator[str]:
    """The connection string of a new database in which nothing has run."""
    name = f"stampline_empty_{uuid.uuid4().hex[:12]}"
    connection = await asyncpg.connect(services.postgres_dsn)
    await connection.execute(f'CREATE DATABASE "{name}"')
    yield with_database(services.postgres_dsn, name)
    await connection.execute(f'DROP DATABASE "{name}" WITH (FORCE)')
    await connection.close()


async def fetch(dsn: str, sql: str, *arguments: Any) -> list[tuple[Any, ...]]:
    """Run one query on a connection of its own."""
    connection = await asyncpg.connect(dsn)
    try:
        return [tuple(row) for row in await connection.fetch(sql, *arguments)]
    finally:
        await connection.close()


async def test_up_down_and_up_again(empty_database: str) -> None:
    """Each migration can be taken back and run again; a second upgrade does nothing."""
    assert await asyncio.to_thread(current, empty_database) is None
    for _ in range(2):
        await asyncio.to_thread(upgrade, empty_database)
        await asyncio.to_thread(upgrade, empty_database)
        shape = await fetch(empty_database, SHAPE)
        assert await asyncio.to_thread(current, empty_database) == head()
        await asyncio.to_thread(downgrade, empty_database, "base")
        assert await asyncio.to_thread(current, empty_database) is None
        assert await fetch(empty_database, SHAPE) == []
        assert await fetch(empty_database, "SELECT viewname FROM pg_views WHERE schemaname = 'public'") == []

    await asyncio.to_thread(upgrade, empty_database)

    assert await fetch(empty_database, SHAPE) == shape


async def test_the_description_equals_the_database(database: str, empty_database: str) -> None:
    """Tables made from `migrations/schema.py` are those that the migrations make, to the last option."""

    def create_all(connection: Connection) -> None:
        metadata.create_all(connection)
        connection.commit()

    await fetch(empty_database, "CREATE SCHEMA stampline")
    await asyncio.to_thread(migrations.run._run, empty_database, None, create_all)

    assert await fetch(empty_database, SHAPE) == await fetch(database, SHAPE)


async def test_autogenerate_finds_nothing_to_do(database: str) -> None:
    """Alembic sees no difference either, partitions and other people's tables included."""
    await fetch(database, "CREATE TABLE public.somebody_elses (i integer)")

    await asyncio.to_thread(
        migrations.run._run, database, None, lambda connection: migrations.run._migrate(connection, command.check)
    )


async def test_a_new_revision_is_the_next_number(
    database: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`revision` writes a file that is numbered, named and ready to be edited."""
    copy = shutil.copytree(Path(migrations.run.__file__).parent, tmp_path / "migrations")
    monkeypatch.setattr(migrations.run, "__file__", str(copy / "run.py"))

    path = await asyncio.to_thread(revision, "add nothing", database)

    assert path.name == f"{int(head()):04d}_add_nothing.py"
    assert path.parent == copy / "versions"
    assert "def upgrade() -> None:" in path.read_text()


async def test_two_at_once_take_turns(empty_database: str) -> None:
    """Two processes that migrate the same database at the same time both end well."""
    await asyncio.gather(*(asyncio.to_thread(upgrade, empty_database) for _ in range(2)))

    assert await asyncio.to_thread(current, empty_database) == head()


async def test_a_migration_does_not_wait_for_a_lock_for_long(database: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A table that somebody uses makes the migration fail as a whole, before everybody queues up behind it."""
    monkeypatch.setattr(migrations.run, "LOCK_TIMEOUT_SECONDS", 0.05)
    reader = await asyncpg.connect(database)
    async with reader.transaction():
        await reader.fetch("SELECT FROM stampline.files")
        with pytest.raises(ServiceUnavailable, match="try again"):
            await asyncio.to_thread(downgrade, database, "base")
    await reader.close()

    assert await asyncio.to_thread(current, database) == head()
    assert await fetch(database, "SELECT FROM public.files") == []


async def test_an_unknown_revision_is_told(database: str) -> None:
    """A revision that this installation does not know changes nothing."""
    with pytest.raises(SettingsError, match="7777"):
        await asyncio.to_thread(upgrade, database, "7777")


async def test_the_views_are_the_contract(database: str) -> None:
    """Each view has the promised columns in the promised order; times are timestamptz and digests text."""
    rows = await fetch(
        database,
        "SELECT table_name, string_agg(column_name, ', ' ORDER BY ordinal_position) FROM information_schema.columns "
        "WHERE table_schema = 'public' GROUP BY table_name",
    )
    wrong = await fetch(
        database,
        "SELECT table_name, column_name, data_type FROM information_schema.columns WHERE table_schema = 'public' AND ("
        "(column_name ~ '(_at|_time)$' AND data_type <> 'timestamp with time zone') "
        "OR (column_name = 'digest' AND data_type <> 'text') OR (column_name = 'metadata' AND data_type <> 'jsonb'))",
    )

    assert {str(name): str(columns) for name, columns in rows} == VIEWS
    assert wrong == []


async def test_the_reader_sees_the_views_and_nothing_else(database: str) -> None:
    """`stampline_reader` may read every view and neither write it nor look behind it."""
    connection = await asyncpg.connect(database)
    await connection.execute("SET ROLE stampline_reader")
    for view in VIEWS:
        assert await connection.fetch(f"SELECT * FROM {view}") == []  # noqa: S608 - our own names
        # A view with a GROUP BY cannot be written by anybody.
        with pytest.raises((asyncpg.InsufficientPrivilegeError, asyncpg.ObjectNotInPrerequisiteStateError)):
            await connection.execute(f"DELETE FROM {view}")  # noqa: S608 - the same
    for statement in (
        "SELECT FROM stampline.files",
        "SELECT FROM stampline.watermarks",
        "SELECT FROM stampline_shadow.watermarks",
        "SELECT stampline.ensure_history_partitions(now())",
        "SELECT stampline.answer(0, 0)",
        "CREATE TABLE stampline.mine (i integer)",
        "CREATE TABLE public.mine (i integer)",
    ):
        with pytest.raises(asyncpg.InsufficientPrivilegeError):
            await connection.execute(statement)
    await connection.close()


async def test_the_reader_outlives_one_of_two_databases(database: str, empty_database: str) -> None:
    """Roles belong to the cluster: taking stampline out of one database leaves the readers of another alone."""
    await asyncio.to_thread(upgrade, empty_database)
    await asyncio.to_thread(downgrade, empty_database, "base")

    connection = await asyncpg.connect(database)
    await connection.execute("SET ROLE stampline_reader")
    assert await connection.fetch("SELECT * FROM files") == []
    await connection.close()


async def test_partitions_of_the_history_are_made_ahead(database: str) -> None:
    """The month that is asked for and the next are there, however many ask at the same time and as often they like."""
    connections = [await asyncpg.connect(database) for _ in range(4)]
    moment = "'2031-12-31 23:59:59.999999+00'"
    for _ in range(2):
        await asyncio.gather(
            *(each.execute(f"SELECT stampline.ensure_history_partitions({moment})") for each in connections)
        )
    for each in connections:
        await each.close()

    partitions = await fetch(
        database,
        "SELECT relname FROM pg_inherits JOIN pg_class ON pg_class.oid = inhrelid "
        "WHERE inhparent = 'stampline.file_history'::regclass AND relname ~ '203[12]' ORDER BY relname",
    )

    assert partitions == [("file_history_2031_12",), ("file_history_2032_01",)]


async def test_a_session_in_another_zone_makes_the_same_partitions(database: str) -> None:
    """Months are those of UTC, whatever the session's time zone and date style are."""
    connection = await asyncpg.connect(
        database, server_settings={"TimeZone": "Pacific/Auckland", "DateStyle": "SQL, DMY"}
    )
    await connection.execute("SELECT stampline.ensure_history_partitions('2033-03-31 23:30:00+00')")
    await connection.execute("SET TimeZone = 'UTC'; SET DateStyle = 'ISO, YMD'")
    (bound,) = await connection.fetchrow(
        "SELECT pg_get_expr(relpartbound, oid) FROM pg_class WHERE relname = 'file_history_2033_03'"
    ) or ("",)
    await connection.close()

    assert bound == "FOR VALUES FROM ('2033-03-01 00:00:00+00') TO ('2033-04-01 00:00:00+00')"
