"""How the rows of a projection get into its table: the one place that knows it for all of them.

The tables stand in the live schema; a rebuild fills tables of the same names in another one. Rows are staged first and
applied then: staging sends them, applying happens within the server, and between the two the caller makes sure that
the rows are his to write (`projections/writer.py`).

Rows of the history are appended where they belong, which is in nobody's way. All others are copied into tables of the
session and brought into theirs by one statement, which takes rows in the order of their keys, so that two writers
never deadlock. Rows of `contents` are shared by all partitions: apply them last.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any, Final

from pipeline.postgres import Connection
from projections import activity, contents, file_history, files
from projections.feed import FeedBatch
from projections.queries import query

#: The schema of the tables behind the views.
LIVE: Final = "stampline"
#: The schema that a rebuild fills.
SHADOW: Final = "stampline_shadow"
#: The schema of what was live before a rebuild.
OLD: Final = "stampline_old"

#: The key of the advisory lock that every transaction which writes rows holds shared (`stage_all`), and who exchanges
#: tables holds alone. It stands in `begin_writing` too.
WRITERS_LOCK: Final = 5706318204417031

_COLUMNS: Final = {
    files.NAME: files.COLUMNS,
    file_history.NAME: file_history.COLUMNS,
    contents.NAME: contents.COLUMNS,
    activity.NAME: activity.COLUMNS,
}


def make_rows(name: str, batch: FeedBatch, partition: int, now: datetime) -> list[tuple[Any, ...]]:
    """Return what `batch`, a piece of the feed of `partition`, means for projection `name`, projected at `now`."""
    if name == files.NAME:
        return files.rows(batch)
    if name == file_history.NAME:
        return file_history.rows(batch, partition, now)
    if name == contents.NAME:
        return contents.rows(batch)
    assert name == activity.NAME
    return activity.rows(batch)


async def stage_all(connection: Connection, rows: Mapping[str, Sequence[tuple[Any, ...]]]) -> None:
    """Begin a transaction that writes: take the lock of all who write, and send rows by projection for the live tables.

    This must come first in its transaction: the staging tables are taken to be empty.
    """
    await connection.execute(f"{query('begin_writing')};\n{query('make_staging_tables')}")
    for name, projected in rows.items():
        await _copy(connection, name, projected, LIVE)


async def stage(connection: Connection, name: str, rows: Sequence[tuple[Any, ...]], schema: str = LIVE) -> None:
    """Send `rows` of one projection: those of the history into their table, others into a table of this session.

    What was staged for this projection before, in the same transaction, is forgotten.
    """
    if name != file_history.NAME:
        await connection.execute(f"{query('make_staging_tables')};\n{query(f'unstage_{name}')}")
    await _copy(connection, name, rows, schema)


async def apply(connection: Connection, name: str, partition: int, now: datetime, schema: str = LIVE) -> int:
    """Bring what was staged in this transaction into the table of the projection.

    Args:
        connection: the one that it was staged on.
        name: the projection.
        partition: where the rows come from.
        now: when they are projected.
        schema: where the table stands.

    Returns:
        The rows that were written. Those of the history are in their table when they are staged, and not counted.
    """
    if name == file_history.NAME:
        return 0
    statement = query(f"upsert_{name}", schema)
    if name == files.NAME:
        return count_rows(await connection.execute(statement, partition, now))
    if name == activity.NAME:
        return count_rows(await connection.execute(statement, partition))
    return count_rows(await connection.execute(statement))


def count_rows(status: str) -> int:
    """Return how many rows a command touched, which is the last word of its status."""
    return int(status.rpartition(" ")[2])


async def _copy(connection: Connection, name: str, rows: Sequence[tuple[Any, ...]], schema: str) -> None:
    if not rows:
        return
    staged = name != file_history.NAME
    await connection.copy_records_to_table(
        f"staged_{name}" if staged else name,
        schema_name="pg_temp" if staged else schema,
        columns=_COLUMNS[name],
        records=rows,
    )
