"""Write batches of the feed to PostgreSQL: the rows of all projections and their watermarks, in one transaction.

That transaction is the commit of the projector; there is no other. Its order:

1. The lock that all writers share. Who exchanges tables after a rebuild takes it alone, between two transactions.
2. COPY of everything that the batch brings: the rows of the history into their table, where they are in nobody's way,
   those of the others into tables of this session (`projections/storage.py`).
3. Compare-and-set of the watermarks of all projections. Where they have moved, another projector owns the partition,
   and the transaction is rolled back with everything in it.
4. The upserts within the server: of `files` and `activity`, then of `contents`. All partitions write rows of the last,
   and those that two of them write at once are waited for until a COMMIT, so it comes as late as possible.
5. COMMIT.

The COPY comes first because PostgreSQL waits for the client's data without any timeout: a projector that freezes in
the middle of a COPY would otherwise keep the watermark's lock, and its successor out, for as long as it is frozen.
After the compare-and-set the server never waits for more than the next short command, and gives the transaction up
when that does not come (`idle_in_transaction_session_timeout`).

What the server or the driver refuses is told by what it says about the batch:

- values out of range, not null, check constraints (ours: a digest has 32 bytes), whatever somebody has added: about
  the rows, `RowsRefused`;
- the unique index of the history: an input is there twice. Nothing may hide that, `PositionLost`;
- no partition of the history for our own clock: about the tables, whatever the rows, `SettingsError`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Final

from pipeline.errors import PartitionFenced, PositionLost, RowsRefused, SettingsError, StamplineError
from pipeline.postgres import Connection, PostgresConnectionManager, find_double, lacks_partition, refuses_data
from projections import activity, contents, file_history, files, storage
from projections.feed import FeedBatch
from projections.queries import query
from projections.watermarks import PROJECTIONS, agree

#: The projections whose rows are staged first and applied then, in the order of that.
_APPLIED: Final = (files.NAME, activity.NAME, contents.NAME)

#: What the making of rows and the driver's encoders raise for a value: not UTF-8, more than 64 bits.
_NOT_ENCODABLE: Final = (ValueError, OverflowError)


@dataclass(frozen=True, slots=True)
class WriteResult:
    """What one write did: rows by projection, the clock time put into them, and how long it took, in ms."""

    rows: Mapping[str, int]
    projected_at: datetime
    milliseconds: float


def _utc_now() -> datetime:
    return datetime.now(UTC)


class ProjectionWriter:
    """Writes all projections of any number of partitions.

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
        # The month whose partitions are known to be there.
        self._month: tuple[int, int] | None = None

    async def open_partition(self, partition: int) -> int:
        """Become the owner of `partition` and return the feed offset to go on from, 0 for a new one.

        Raises:
            PositionLost: the projections stand at different offsets; the message says what to run.
            ServiceUnavailable, BatchAborted, SettingsError: as `PostgresConnectionManager.connection`.
        """
        now = self._now()
        async with self._manager.connection() as connection:
            await self._ensure_history_partitions(connection, now)
            rows = await connection.fetch(query("open_watermarks"), PROJECTIONS, partition, self._owner, now)
        return agree(partition, {row["projection"]: row["feed_offset"] for row in rows})

    async def write(
        self, partition: int, expected_feed_offset: int, batch: FeedBatch, next_feed_offset: int
    ) -> WriteResult:
        """Write `batch` and move the watermarks from `expected_feed_offset` to `next_feed_offset`: all or nothing.

        Raises:
            PartitionFenced: the watermarks do not stand at `expected_feed_offset`; nothing has been written.
            RowsRefused: PostgreSQL does not take rows of the batch; nothing has been written.
            PositionLost: an input is in the history already; nothing has been written.
            ServiceUnavailable: also where the answer to the COMMIT was lost: call `open_partition` to see which it was.
            BatchAborted: nothing has been written; the same call may succeed now.
            SettingsError: as `PostgresConnectionManager.connection`; or the history has no partition for now.
        """
        return await self._write(partition, expected_feed_offset, batch, next_feed_offset, commit=True)

    async def attempt(
        self, partition: int, expected_feed_offset: int, batch: FeedBatch, next_feed_offset: int
    ) -> str | None:
        """Do what `write` does and take it back: return why PostgreSQL refuses rows of `batch`, None if it does not.

        Raises:
            StamplineError: as `write`, but for `RowsRefused`.
        """
        try:
            await self._write(partition, expected_feed_offset, batch, next_feed_offset, commit=False)
        except RowsRefused as exc:
            return str(exc)
        return None

    async def _write(
        self, partition: int, expected_feed_offset: int, batch: FeedBatch, next_feed_offset: int, *, commit: bool
    ) -> WriteResult:
        assert next_feed_offset > expected_feed_offset
        started = time.perf_counter()
        async with self._manager.connection() as connection:
            now = self._now()
            await self._ensure_history_partitions(connection, now)
            with self._refusals(), suppress(_TakenBack):
                rows = {name: storage.make_rows(name, batch, partition, now) for name in PROJECTIONS}
                written = {name: len(projected) for name, projected in rows.items()}
                async with connection.transaction(isolation="read_committed"):
                    await storage.stage_all(connection, rows)
                    moved = await connection.execute(
                        query("move_watermarks"),
                        PROJECTIONS,
                        partition,
                        expected_feed_offset,
                        next_feed_offset,
                        batch.next_input_offset,
                        batch.event_time,
                        now,
                        self._owner,
                    )
                    if storage.count_rows(moved) != len(PROJECTIONS):
                        raise PartitionFenced(
                            f"another projector has moved the watermark of partition {partition}, "
                            f"it is not at feed offset {expected_feed_offset} any more"
                        )
                    for name in _APPLIED:
                        if rows[name]:
                            written[name] = await storage.apply(connection, name, partition, now)
                    if not commit:
                        raise _TakenBack
        return WriteResult(
            rows=written,
            projected_at=now,
            milliseconds=(time.perf_counter() - started) * 1000,
        )

    @contextmanager
    def _refusals(self) -> Iterator[None]:
        """Raise what is refused inside the block as ours."""
        try:
            yield
        except Exception as exc:
            if not refuses_data(exc) and not isinstance(exc, _NOT_ENCODABLE):
                raise
            if lacks_partition(exc):
                self._month = None  # Was it dropped? The next call makes it again.
            raise _refusal(exc) from exc

    async def _ensure_history_partitions(self, connection: Connection, now: datetime) -> None:
        """Make this month's and the next month's partition of the history, once a month and outside the commit."""
        month = (now.year, now.month)
        if month == self._month:
            return
        await connection.execute(query("ensure_history_partitions"), now)
        self._month = month


class _TakenBack(Exception):
    """Rolls a transaction back that was only an attempt."""


def _refusal(exc: Exception) -> StamplineError:
    """Return our error for something refused, with the first line of what is said; the rest of it tells values."""
    said = str(exc).partition("\n")[0] or type(exc).__name__
    if lacks_partition(exc):
        return SettingsError(
            f"the history has no partition for this month ({said}): if it was detached, attach it again; "
            "if it was dropped, it is made anew"
        )
    double = find_double(exc)
    if double is not None and double.table.startswith(file_history.NAME):
        return PositionLost(
            f"an input is in the history already ({said}; {double.key}): the feed holds it twice, or rows were "
            "changed by hand. Nothing was written; `stampline verify` tells what is there"
        )
    return RowsRefused(said)
