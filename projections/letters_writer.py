"""Write batches of dead letters to PostgreSQL: their rows and the watermark of the partition, in one transaction.

The order is that of `projections/writer.py`, for the same reasons: COPY into a table of the session, compare-and-set of
the watermark, upsert within the server, COMMIT. A letter and its mark may come from two partitions (a foreign topic has
other partitions than ours), so rows are taken in the order of their keys.

Whatever is in the topic can be written (`projections/dead_letters.py`). Where PostgreSQL refuses it all the same, the
table is not what it was, and the partition waits until somebody has mended it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime

from pipeline.errors import PartitionFenced, RowsRefused
from pipeline.postgres import PostgresConnectionManager, refuses_data
from projections import dead_letters
from projections.dead_letters import DeadRecord
from projections.queries import query


def _utc_now() -> datetime:
    return datetime.now(UTC)


class LettersWriter:
    """Writes the dead letters of any number of partitions.

    Args:
        manager: the connections; the caller opens and closes them.
        owner: the name of this process in the watermarks.
        now: the clock, in UTC.
    """

    def __init__(
        self, manager: PostgresConnectionManager, owner: str, *, now: Callable[[], datetime] = _utc_now
    ) -> None:
        self._manager = manager
        self._owner = owner
        self._now = now

    async def open_partition(self, partition: int) -> int:
        """Become the owner of `partition` and return the offset to go on from, 0 for a new one.

        Raises:
            ServiceUnavailable, BatchAborted, SettingsError: as `PostgresConnectionManager.connection`.
        """
        async with self._manager.connection() as connection:
            offset: int = await connection.fetchval(
                query("open_dead_letters"), dead_letters.NAME, partition, self._owner, self._now()
            )
        return offset

    async def write(self, partition: int, expected_offset: int, records: Sequence[DeadRecord], next_offset: int) -> int:
        """Write `records` and move the watermark from `expected_offset` to `next_offset`: all or nothing.

        Returns:
            How many letters and marks came to rows.

        Raises:
            PartitionFenced: the watermark does not stand at `expected_offset`; nothing has been written.
            RowsRefused: PostgreSQL does not take the rows; nothing has been written.
            ServiceUnavailable: also where the answer to the COMMIT was lost: call `open_partition` to see which it was.
            BatchAborted: nothing has been written; the same call may succeed now.
            SettingsError: as `PostgresConnectionManager.connection`.
        """
        assert next_offset > expected_offset
        rows = dead_letters.rows(records)
        with _refusals():
            async with self._manager.connection() as connection, connection.transaction(isolation="read_committed"):
                await connection.execute(query("stage_dead_letters"))
                await connection.copy_records_to_table(
                    "staged_dead_letters", schema_name="pg_temp", columns=dead_letters.COLUMNS, records=rows
                )
                moved = await connection.execute(
                    query("move_watermarks"),
                    [dead_letters.NAME],
                    partition,
                    expected_offset,
                    next_offset,
                    None,
                    dead_letters.event_time(records),
                    self._now(),
                    self._owner,
                )
                if moved != "UPDATE 1":
                    raise PartitionFenced(
                        f"another projector has moved the watermark of the dead letters of partition {partition}, "
                        f"it is not at offset {expected_offset} any more"
                    )
                await connection.execute(query("upsert_dead_letters"))
                await connection.execute(query("mark_dead_letters"))
        return len(rows)


@contextmanager
def _refusals() -> Iterator[None]:
    """Raise what is refused inside the block as ours."""
    try:
        yield
    except Exception as exc:
        if not refuses_data(exc):
            raise
        said = str(exc).partition("\n")[0]
        raise RowsRefused(
            f"PostgreSQL refuses dead letters ({said}): mend table stampline.dead_letters, "
            "and the partition goes on by itself"
        ) from exc
