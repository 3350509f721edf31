"""Rebuild a projection while it is being read and written: fill a shadow of it from the feed.

The shadow is filled a batch at a time. In one PostgreSQL transaction are the rows of the batch and the shadow's own
watermark, from where it stood to after the batch (compare-and-set). So a rebuild may be ended at any moment, in any
way, and goes on where it was. It never passes the live projection: where that stands, the feed ends for a rebuild.

What compaction has taken from the feed is taken over from the live tables, in the same transactions. Changes come in
rising order of their inputs, so a batch answers for a range of inputs; what the live history knows of that range and
the batch does not, compaction has taken. The cleaner of the broker may be at work between two batches, which is why
`contents` does not believe what a change says of its file's content before, but remembers what it counted itself.

Afterwards it is compared with the live projection (`projections/comparison.py`).

It is gentle: small batches, commits that wait for no disk, and while the live projection is late, a rest after each
batch that is as long as the batch took.
"""

from __future__ import annotations

import asyncio
import os
import socket
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Final

from msgspec.structs import replace

from pipeline.errors import BatchAborted, PartitionFenced, PositionLost, RowsRefused, SettingsError, StamplineError
from pipeline.logreader import LogReader
from pipeline.postgres import Connection, PostgresConnectionManager, find_double, lacks_partition, refuses_data
from pipeline.settings import Settings
from pipeline.topics import FILES_CHANGELOG, topic_name
from projections import activity, contents, copies, file_history, files, storage
from projections.copies import WHOLE_TABLE_SECONDS, Mark, statement
from projections.feed import FeedBatch, FeedRecord, decode_feed
from projections.queries import query
from projections.recount import count_contents
from projections.refusals import Allowance, sift
from projections.storage import SHADOW

#: Most records in a transaction.
BATCH_RECORDS: Final = 2000
#: How late the live projection may be before a rebuild rests, in ms, and how often that is looked at, in s.
_LATE_MS: Final = 100
_LOOK_SECONDS: Final = 0.5
#: A copy is close behind the live one when so few offsets are missing; how often it runs after it to come so close.
_CLOSE_OFFSETS: Final = 2 * BATCH_RECORDS
_ROUNDS: Final = 20
_TRIES: Final = 5

_PROJECTED_AT: Final = file_history.COLUMNS.index("projected_at")
_NOT_ENCODABLE: Final = (ValueError, OverflowError)


@dataclass(slots=True)
class Tally:
    """What a command has done so far.

    Offsets of the feed that it read, of those that it has to; inputs that compaction had taken from the feed and that
    were copied from the live tables; records that PostgreSQL refused.
    """

    read: int = 0
    total: int = 0
    copied: int = 0
    refused: int = 0


class _TakenBack(Exception):
    """Rolls a transaction back that was only an attempt."""


@dataclass(frozen=True, slots=True)
class Piece:
    """A piece of the feed that is written at once: from one mark to another, without what was dropped by age."""

    start: Mark
    end: Mark
    dropped_before: int


class Filler:
    """Brings one copy of a projection to given marks.

    Args:
        settings: where Kafka is.
        manager: connections to PostgreSQL.
        name: the projection.
        schema: the schema of the copy.
        report: is told the tally after each batch.
    """

    def __init__(
        self,
        settings: Settings,
        manager: PostgresConnectionManager,
        name: str,
        schema: str,
        report: Callable[[Tally], None] = lambda _tally: None,
    ) -> None:
        self.settings = settings
        self.manager = manager
        self.name = name
        self.schema = schema
        self.tally = Tally()
        self._report = report
        self._owner = f"rebuild-{socket.gethostname()}-{os.getpid()}"
        self._allowances: dict[int, Allowance] = {}
        self._late = False
        self._looked_at = 0.0

    async def follow(self) -> None:
        """Fill until the live projection is close, or as often as helps: it may be faster than a rebuild."""
        for _ in range(_ROUNDS):
            async with self.manager.connection() as connection:
                marks = await copies.live_marks(connection)
            if await self.advance(marks) < _CLOSE_OFFSETS:
                return

    async def advance(self, marks: Sequence[Mark]) -> int:
        """Fill to exactly these marks, one partition after the other, and return how many offsets that were.

        Raises:
            PartitionFenced: the copy's watermark was moved by somebody else.
            PositionLost: the feed does not reach to the marks.
            RowsRefused: PostgreSQL refuses too many records.
            ServiceUnavailable, SettingsError: as the connections.
        """
        async with self.manager.connection() as connection:
            await connection.execute(query("ensure_history_partitions"), _now())
            await copies.align(connection, self.name, self.schema)
            starts = await self._open(connection, marks)
        ahead = [mark.partition for mark in marks if starts[mark.partition].feed_offset > mark.feed_offset]
        if ahead:
            raise PositionLost(
                f"the copy {self.schema}.{self.name} has come further than what is live, in partition {ahead[0]}: the "
                "live tables were restored or emptied; drop the copy (`stampline projections cancel` or `drop-old`)"
            )
        missing = sum(mark.feed_offset - starts[mark.partition].feed_offset for mark in marks)
        self.tally.total += missing
        for mark in marks:
            if starts[mark.partition] != mark:
                await self._fill(starts[mark.partition], mark)
        return missing

    async def _open(self, connection: Connection, marks: Sequence[Mark]) -> dict[int, Mark]:
        for mark in marks:
            await connection.execute(
                query("open_watermarks", self.schema), [self.name], mark.partition, self._owner, _now()
            )
        await connection.execute(
            statement("set_copy_ends", self.schema),
            self.name,
            [mark.partition for mark in marks],
            [mark.feed_offset for mark in marks],
        )
        return await copies.copy_marks(connection, self.name, self.schema)

    async def _fill(self, position: Mark, mark: Mark) -> None:
        async with self.manager.connection() as connection:
            dropped = await connection.fetchval(statement("dropped_history"), mark.partition)
        async with open_feed(self.settings, mark.partition) as reader:
            until = mark.feed_offset
            async for records in reader.read(position.feed_offset, until, BATCH_RECORDS):
                started = time.perf_counter()
                position = await self._commit(position, mark, records, min(reader.position, until), dropped)
                await self._rest(time.perf_counter() - started)
        if position != mark:
            await self._commit(position, mark, (), until, dropped)

    async def _commit(
        self, position: Mark, mark: Mark, records: Sequence[FeedRecord], feed_offset: int, dropped: int
    ) -> Mark:
        """Write some records without those that PostgreSQL refuses, and return where the copy stands then."""
        batch = decode_feed(records)
        piece = plan_piece(position, mark, batch, feed_offset, dropped)
        try:
            await self._write(piece, batch, batch)
        except RowsRefused as exc:
            if not batch.changes:
                raise
            allowance = self._allowances.setdefault(mark.partition, Allowance())

            async def attempt(part: FeedBatch) -> str | None:
                try:
                    await self._write(piece, part, batch, commit=False)
                except RowsRefused as refusal:
                    return str(refusal)
                return None

            refused, rest = await sift(records, str(exc), attempt, allowance.left)
            await self._write(piece, rest, batch)
            allowance.spend(len(refused))
            allowance.earn(len(rest.changes))
            self.tally.refused += len(refused)
        self.tally.read += piece.end.feed_offset - piece.start.feed_offset
        self._report(self.tally)
        return piece.end

    async def _write(self, piece: Piece, batch: FeedBatch, whole: FeedBatch, *, commit: bool = True) -> None:
        """Write `batch`, the part of `whole` that is not refused, in a transaction; or try it and take it back."""
        for tries_left in reversed(range(_TRIES)):
            try:
                async with self.manager.connection() as connection:
                    with suppress(_TakenBack):
                        async with connection.transaction(isolation="read_committed"):
                            await connection.execute(statement("commit_loosely"))
                            copied = await self.write(connection, piece, batch, whole, copy=commit)
                            if not commit:
                                raise _TakenBack
            except BatchAborted:
                if not tries_left:
                    raise
            else:
                self.tally.copied += copied if commit else 0
                return

    async def write(
        self, connection: Connection, piece: Piece, batch: FeedBatch, whole: FeedBatch, *, copy: bool = True
    ) -> int:
        """Write a piece within the caller's transaction; return how many inputs were copied from the live tables.

        Raises:
            RowsRefused: PostgreSQL does not take rows of the batch.
            PartitionFenced: the copy's watermark does not stand at the start of the piece.
        """
        try:
            return await self._write_all(connection, piece, batch, whole, copy=copy)
        except Exception as exc:
            if not refuses_data(exc) and not isinstance(exc, _NOT_ENCODABLE):
                raise
            raise _refusal(exc, self.name) from exc

    async def _write_all(
        self, connection: Connection, piece: Piece, batch: FeedBatch, whole: FeedBatch, *, copy: bool
    ) -> int:
        partition, now = piece.start.partition, _now()
        kept = self._without_dropped(batch, piece.dropped_before)
        rows, taken_away = await self._rows(connection, kept, partition, now)
        await storage.stage(connection, self.name, rows, self.schema)
        moved = await connection.execute(
            query("move_watermarks", self.schema),
            [self.name],
            partition,
            piece.start.feed_offset,
            piece.end.feed_offset,
            piece.end.input_offset,
            whole.event_time,
            now,
            self._owner,
        )
        if storage.count_rows(moved) != 1:
            raise PartitionFenced(
                f"another rebuild of {self.name} has moved the watermark of partition {partition}, it is not at feed "
                f"offset {piece.start.feed_offset} any more"
            )
        await storage.apply(connection, self.name, partition, now, self.schema)
        if self.name == files.NAME:
            await connection.execute(statement("keep_files_projected_at", self.schema))
        if taken_away:
            await storage.stage(connection, self.name, taken_away, self.schema)
            await storage.apply(connection, self.name, partition, now, self.schema)
        return await self._copy_lost(connection, piece, whole) if copy else 0

    def _without_dropped(self, batch: FeedBatch, before: int) -> FeedBatch:
        """Leave out the changes whose history was dropped by age, where that matters."""
        if self.name not in {file_history.NAME, activity.NAME}:
            return batch
        if not batch.changes or batch.changes[0].input_offset >= before:
            return batch
        kept = [place for place, change in enumerate(batch.changes) if change.input_offset >= before]
        return replace(
            batch, keys=[batch.keys[place] for place in kept], changes=[batch.changes[place] for place in kept]
        )

    async def _rows(
        self, connection: Connection, batch: FeedBatch, partition: int, now: datetime
    ) -> tuple[Sequence[tuple[Any, ...]], Sequence[tuple[Any, ...]]]:
        """Return the rows of a batch, and for `contents` those that take away what compaction has kept from it."""
        if self.name == contents.NAME and self.schema == SHADOW:
            return await count_contents(connection, batch)
        rows = storage.make_rows(self.name, batch, partition, now)
        if self.name == file_history.NAME and rows:
            offsets = [change.input_offset for change in batch.changes]
            live = await connection.fetch(statement("history_projected_at"), partition, offsets)
            times = {row["input_offset"]: row["projected_at"] for row in live}
            rows = [
                (*row[:_PROJECTED_AT], times.get(offset, now), *row[_PROJECTED_AT + 1 :])
                for offset, row in zip(offsets, rows, strict=True)
            ]
        return rows, ()

    async def _copy_lost(self, connection: Connection, piece: Piece, whole: FeedBatch) -> int:
        """Copy what compaction has taken from the piece of the feed."""
        begin, end = max(piece.start.input_offset, piece.dropped_before), piece.end.input_offset
        if self.name not in {file_history.NAME, activity.NAME} or begin >= end:
            return 0
        own = [change.input_offset for change in whole.changes]
        if len(own) == end - begin and own[0] == begin:
            return 0
        arguments = (piece.start.partition, begin, end, own)
        if self.name == activity.NAME:
            counted: int = await connection.fetchval(
                statement("copy_activity", self.schema), *arguments, timeout=WHOLE_TABLE_SECONDS
            )
            return counted
        return storage.count_rows(
            await connection.execute(statement("copy_history", self.schema), *arguments, timeout=WHOLE_TABLE_SECONDS)
        )

    async def _rest(self, seconds: float) -> None:
        """Leave the machine to the live projection for as long as the batch took, while that is late."""
        now = time.monotonic()
        if now - self._looked_at > _LOOK_SECONDS:
            self._looked_at = now
            async with self.manager.connection() as connection:
                self._late = await connection.fetchval(statement("live_lag")) > _LATE_MS
        await asyncio.sleep(seconds if self._late else 0)


def open_feed(settings: Settings, partition: int, *, wait_ms: int = 200) -> LogReader:
    """Return a reader of one partition of the feed, not yet opened."""
    return LogReader(settings, topic_name(settings, FILES_CHANGELOG), partition, wait_ms=wait_ms)


def plan_piece(position: Mark, mark: Mark, batch: FeedBatch, feed_offset: int, dropped: int) -> Piece:
    """Return the piece of the feed that `batch` is, which ends before `feed_offset`.

    At the mark the live projection says which inputs it has answered for: compaction may have taken the record that
    told it.
    """
    input_offset = max(position.input_offset, batch.next_input_offset or 0)
    if feed_offset == mark.feed_offset:
        input_offset = max(input_offset, mark.input_offset)
    return Piece(position, Mark(mark.partition, feed_offset, input_offset), dropped)


def _refusal(exc: Exception, name: str) -> StamplineError:
    """Return our error for something refused, with the first line of what is said; the rest of it tells values."""
    said = str(exc).partition("\n")[0] or type(exc).__name__
    if lacks_partition(exc):
        return SettingsError(f"the copy of {name} has no partition for a row ({said}): run the command again")
    if find_double(exc) is not None:
        return PositionLost(f"the feed holds an input twice, or the copy of {name} was changed by hand ({said})")
    return RowsRefused(said)


def _now() -> datetime:
    return datetime.now(UTC)
