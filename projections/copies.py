"""Copies of a projection beside the live one: a shadow that a rebuild fills, and the old one after a swap.

A copy is a table of the live one's name, in a schema of its own that has watermarks of its own. It is made here, held
to the shape of the live table, and dropped; nobody else is at the same projection meanwhile (`guarded`).
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import datetime
from functools import cache
from typing import Any, Final, NamedTuple

from pipeline.errors import StamplineError
from pipeline.postgres import Connection, PostgresConnectionManager
from projections import contents, file_history
from projections.queries import read_script
from projections.storage import LIVE, OLD, SHADOW
from projections.watermarks import PROJECTIONS

#: The projections that a rebuild can fill, all from the changelog of table `files`.
REBUILDABLE: Final = PROJECTIONS

#: What goes over a whole table takes as long as it takes, in s.
WHOLE_TABLE_SECONDS: Final = 24 * 3600.0


class Mark(NamedTuple):
    """How far one partition is projected: the next feed offset and the next input offset."""

    partition: int
    feed_offset: int
    input_offset: int


@dataclass(frozen=True, slots=True)
class Overview:
    """One projection as `stampline projections list` shows it. Rows are estimates.

    `shadow_percent` says how much of what is live the rebuild has read, None where there is none; `old_since` when the
    old table was live for the last time.
    """

    projection: str
    rows: int
    input_offset_min: int | None
    input_offset_max: int | None
    status: str | None
    lag_ms: int | None
    shadow_percent: float | None
    shadow_rows: int | None
    old_since: datetime | None
    old_rows: int | None


@cache
def statement(name: str, schema: str = SHADOW) -> str:
    """Return the statement of a rebuild called `name`, for the copy in `schema`.

    Raises:
        KeyError: there is none, which is a bug of ours.
    """
    return read_script("rebuild_queries.sql")[name].replace(f"{SHADOW}.", f"{schema}.")


@asynccontextmanager
async def guarded(manager: PostgresConnectionManager, name: str) -> AsyncIterator[Connection]:
    """Keep every other command away from the copies of projection `name`; lend the connection that does so.

    Raises:
        StamplineError: one is at it already, or `name` cannot be rebuilt.
        ServiceUnavailable: as `PostgresConnectionManager.connection`.
    """
    if name not in REBUILDABLE:
        raise StamplineError(f"projection {name} cannot be rebuilt; those that can: {', '.join(REBUILDABLE)}")
    async with manager.connection() as connection:
        if not await connection.fetchval(statement("take_guard"), name):
            raise StamplineError(
                f"another `stampline projections` command is working on {name}: wait for its end, or end it with "
                "Ctrl-C; what it has done is kept"
            )
        yield connection


async def exists(connection: Connection, name: str, schema: str) -> bool:
    """Tell whether `schema` has a table for projection `name`."""
    found: bool = await connection.fetchval(statement("find_copy"), name, schema)
    return found


async def create_shadow(connection: Connection, name: str) -> None:
    """Make an empty shadow of projection `name`, all or nothing."""
    async with connection.transaction(isolation="read_committed"):
        await _run(connection, "creation", name, SHADOW)
        if name == contents.NAME:
            await connection.execute(statement("make_contents_seen"))


async def align(connection: Connection, name: str, schema: str) -> None:
    """Hold a copy to the shape of the live table: give it the same partitions, and what was dropped by age take away.

    Raises:
        StamplineError: the live table has other columns or indexes by now.
    """
    if await connection.fetchval(statement("shape"), name, schema) != await connection.fetchval(
        statement("shape"), name, LIVE
    ):
        command = "cancel" if schema == SHADOW else "drop-old"
        raise StamplineError(
            f"the table {schema}.{name} has not the columns and indexes that the live one has by now: "
            f"run `stampline projections {command} {name}`, and rebuild it"
        )
    async with connection.transaction(isolation="read_committed"):
        await _run(connection, "alignment", name, schema)
    if name == file_history.NAME:
        await connection.execute(statement("forget_dropped_history", schema), timeout=WHOLE_TABLE_SECONDS)


async def drop(connection: Connection, name: str, schema: str) -> None:
    """Drop a copy and forget its watermarks, all or nothing.

    Raises:
        StamplineError: somebody's view stands on it.
    """
    assert schema != LIVE
    async with connection.transaction(isolation="read_committed"):
        views = await connection.fetch(statement("dependents"), name, schema)
        if views:
            raise StamplineError(
                f"{', '.join(row['place'] for row in views)} stands on {schema}.{name}: drop it, or let it read the "
                "view of stampline"
            )
        await connection.execute(f"DROP TABLE {schema}.{name}")
        await connection.execute(statement("forget_watermarks", schema), name)
        if name == contents.NAME and schema == SHADOW:
            await connection.execute(statement("drop_contents_seen"))


async def move(connection: Connection, name: str, source: str, target: str) -> None:
    """Move the table of projection `name` with its partitions to another schema, within the caller's transaction."""
    await _run(connection, "moving", name, source, target)


async def live_marks(connection: Connection) -> list[Mark]:
    """Return how far the live projections have come."""
    return [Mark(*row) for row in await connection.fetch(statement("live_marks"), REBUILDABLE)]


async def copy_marks(connection: Connection, name: str, schema: str) -> dict[int, Mark]:
    """Return how far a copy has come, by partition."""
    rows = await connection.fetch(statement("copy_marks", schema), name)
    return {row["partition"]: Mark(row["partition"], row["feed_offset"], row["input_offset"]) for row in rows}


async def overview(connection: Connection, lag: Sequence[Any]) -> list[Overview]:
    """Return every projection with its copies, `lag` being the rows of the view `projection_lag`."""
    marks = {(row["projection"], row["schema"]): row for row in await connection.fetch(statement("all_marks"))}
    names = [*REBUILDABLE, *sorted({name for name, _ in marks} - set(REBUILDABLE))]
    tables = {
        (row["projection"], row["schema"]): row["rows"] for row in await connection.fetch(statement("copies"), names)
    }
    return [_overview(name, marks, tables, lag) for name in names]


def _overview(
    name: str,
    marks: Mapping[tuple[str, str], Any],
    tables: Mapping[tuple[str, str], int],
    lag: Sequence[Any],
) -> Overview:
    live, shadow, old = (marks.get((name, schema)) for schema in (LIVE, SHADOW, OLD))
    late = [row for row in lag if row["projection"] == name and row["status"] != "rebuilding"]
    worst = max(late, key=lambda row: (row["status"] == "stalled", row["lag_ms"] or 0), default=None)
    percent = None
    if (name, SHADOW) in tables:
        total = live["feed_offsets"] if live else 0
        percent = round(100 * min(1.0, (shadow["feed_offsets"] if shadow else 0) / total), 1) if total else 100.0
    return Overview(
        projection=name,
        rows=tables.get((name, LIVE), 0),
        input_offset_min=live["input_offset_min"] if live else None,
        input_offset_max=live["input_offset_max"] if live else None,
        status=worst["status"] if worst else None,
        lag_ms=worst["lag_ms"] if worst else None,
        shadow_percent=percent,
        shadow_rows=tables.get((name, SHADOW)),
        old_since=old["updated_at"] if old else None,
        old_rows=tables.get((name, OLD)),
    )


async def _run(connection: Connection, name: str, *arguments: str) -> None:
    """Run the statements that the statement `name` makes."""
    for row in await connection.fetch(statement(name), *arguments):
        await connection.execute(row["statement"])
