"""Exchange a projection's table for a copy of it, while readers and projectors go on; and back again.

One short transaction does it, in this order:

1. The copy's own table, which nobody reads; and for the history, nobody may make or drop partitions.
2. The lock of all who write, alone: projectors finish the transaction that they are in, and wait before the next.
3. The copy is brought to exactly where the live one stands. That is little, for it came close before.
4. The views that stand on the live table, then the table, each locked as every reader locks them: from the top down.
5. The live table becomes the old one, the copy the live one. Nothing is renamed, for names are unique per schema.
6. Our views are made again with the same text, which finds the new table. They stay the same objects: grants, and the
   views of users on them, stay too. Functions and statements find tables by their names anyway.
7. COMMIT: whoever waited goes on with the new table. A reader who has waited on the old one reads that, in full.

Locks are not waited for longer than a reader or a projector should wait behind us. Where they are not to be had, all is
let go and tried again; and while somebody has been in a transaction with the table for a while it is not even tried.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any, Final

from pipeline.errors import BatchAborted, RowsRefused, StamplineError
from pipeline.logreader import LogReader
from pipeline.postgres import Connection, PostgresConnectionManager
from pipeline.settings import Settings
from projections import contents, copies, file_history
from projections.comparison import Comparison, compare
from projections.copies import WHOLE_TABLE_SECONDS, Mark, statement
from projections.feed import FeedRecord, decode_feed
from projections.rebuild import Filler, Tally, open_feed, plan_piece
from projections.storage import LIVE, OLD, SHADOW, WRITERS_LOCK

#: Longest that an exchange is tried, in s.
PATIENCE_SECONDS: Final = 60.0
#: Longest wait for a lock while others wait behind us, in ms. PostgreSQL looks for deadlocks after a second: by then
#: we have let go, and a reader who is in a circle with us comes to no harm.
_WAIT_MS: Final = 500
#: The same where autovacuum is in the way: PostgreSQL sends it off after a second, and not before.
_WAIT_FOR_AUTOVACUUM_MS: Final = 1500
#: The same while nobody waits behind us.
_WAIT_ALONE_MS: Final = 3000
#: Who is in a transaction with the table for so long will not be gone within a wait, in s.
_LONG_SECONDS: Final = 1.0
#: The pause between two tries, from and to, in s.
_PAUSE_SECONDS: Final = (0.5, 1.5)
#: How often the end of a feed is looked up that must be further than it was.
_LOOKS: Final = 3
#: Most offsets that are read while all projectors wait.
_GAP_OFFSETS_MAX: Final = 50_000
#: Compaction leaves changes alone for 7 days (`pipeline/topics.py`).
_FEED_IS_WHOLE: Final = timedelta(days=6)


@dataclass(frozen=True, slots=True)
class Swapped:
    """What came of a swap or a rollback. `held_ms` is how long projectors had to wait, None where nothing was done."""

    projection: str
    held_ms: float | None
    comparison: Comparison | None


async def swap(
    settings: Settings,
    manager: PostgresConnectionManager,
    name: str,
    *,
    accept: Callable[[Comparison], bool],
    drop_old: bool = False,
    report: Callable[[Tally], None] = lambda _tally: None,
    patience_seconds: float = PATIENCE_SECONDS,
) -> Swapped:
    """Put the shadow of projection `name` in the place of the live table, which becomes the old one.

    Args:
        settings: where Kafka is.
        manager: connections to PostgreSQL.
        name: the projection.
        accept: is asked where the shadow differs from the live table.
        drop_old: drop the old table of an earlier swap.
        report: is told the tally after each batch.
        patience_seconds: how long to try.

    Raises:
        StamplineError: there is no shadow, or an old table is in the way, or somebody uses the table all the time.
    """
    async with copies.guarded(manager, name) as guard:
        if not await copies.exists(guard, name, SHADOW):
            raise StamplineError(
                f"there is no rebuild of {name} to swap in: run `stampline projections rebuild {name}` first"
            )
        if not drop_old and await copies.exists(guard, name, OLD):
            raise StamplineError(
                f"the old table of {name} from the swap before is still there: run `stampline projections drop-old "
                f"{name}`, or swap with --drop-old"
            )
        filler = Filler(settings, manager, name, SHADOW, report)
        await filler.follow()
        comparison = await compare(filler, guard)
        if not comparison.equal and not accept(comparison):
            return Swapped(name, None, comparison)
        if await copies.exists(guard, name, OLD):
            await copies.drop(guard, name, OLD)
        return Swapped(name, await _exchange(filler, guard, patience_seconds), comparison)


async def roll_back(
    settings: Settings,
    manager: PostgresConnectionManager,
    name: str,
    *,
    report: Callable[[Tally], None] = lambda _tally: None,
    patience_seconds: float = PATIENCE_SECONDS,
) -> Swapped:
    """Put the old table of projection `name` back, brought up to date from the feed; what is live becomes the old one.

    Raises:
        StamplineError: there is no old table, or a rebuild is under way, or somebody uses the table all the time.
    """
    async with copies.guarded(manager, name) as guard:
        if not await copies.exists(guard, name, OLD):
            raise StamplineError(f"there is no old table of {name} to go back to: it was never swapped, or is dropped")
        if await copies.exists(guard, name, SHADOW):
            raise StamplineError(
                f"a rebuild of {name} is in the way: run `stampline projections cancel {name}`, or swap it in"
            )
        if name == contents.NAME:
            await _require_whole_feed(guard)
        filler = Filler(settings, manager, name, OLD, report)
        await filler.follow()
        return Swapped(name, await _exchange(filler, guard, patience_seconds), None)


async def drop_copy(
    manager: PostgresConnectionManager, name: str, schema: str, *, confirm: Callable[[], object] = lambda: None
) -> None:
    """Drop the shadow of projection `name`, or its old table; `confirm` is called before, and may raise.

    Raises:
        StamplineError: there is none, or somebody's view stands on it.
    """
    async with copies.guarded(manager, name) as guard:
        if not await copies.exists(guard, name, schema):
            kind = "rebuild" if schema == SHADOW else "old table"
            raise StamplineError(f"there is no {kind} of {name}; `stampline projections list` shows what there is")
        confirm()
        await copies.drop(guard, name, schema)


async def _require_whole_feed(connection: Connection) -> None:
    """Make sure that compaction has not taken changes since the old table was live: `contents` counts differences."""
    rows = await connection.fetch(statement("copy_marks", OLD), contents.NAME)
    since = min((row["updated_at"] for row in rows), default=datetime.now(UTC))
    if datetime.now(UTC) - since > _FEED_IS_WHOLE:
        raise StamplineError(
            f"the old table of {contents.NAME} is from {since:%Y-%m-%d %H:%M}Z, and compaction may have taken changes "
            f"since: run `stampline projections rebuild {contents.NAME}` instead"
        )


async def _exchange(filler: Filler, guard: Connection, patience_seconds: float) -> float:
    """Try until the table is exchanged; return how long projectors had to wait for it, in ms."""
    name = filler.name
    # Without it the first queries on the new table would be planned without knowing anything of it.
    await guard.execute(f"ANALYZE {filler.schema}.{name}", timeout=WHOLE_TABLE_SECONDS)
    deadline = time.monotonic() + patience_seconds
    while True:
        await filler.follow()
        said = ""
        holders = await guard.fetch(statement("holders"), name, WRITERS_LOCK)
        if not any(_is_long(holder) and not holder["is_autovacuum"] for holder in holders):
            wait_ms = _WAIT_FOR_AUTOVACUUM_MS if any(row["is_autovacuum"] for row in holders) else _WAIT_MS
            try:
                async with (
                    _open_feeds(filler, await copies.live_marks(guard)) as readers,
                    filler.manager.connection() as connection,
                ):
                    return await _exchange_now(connection, filler, readers, wait_ms)
            except (BatchAborted, RowsRefused) as exc:
                said = str(exc)
            holders = await guard.fetch(statement("holders"), name, WRITERS_LOCK)
        if time.monotonic() > deadline:
            raise StamplineError(_tell_holders(name, patience_seconds, holders, said))
        await asyncio.sleep(random.uniform(*_PAUSE_SECONDS))


@asynccontextmanager
async def _open_feeds(filler: Filler, marks: Sequence[Mark]) -> AsyncIterator[Mapping[int, LogReader]]:
    """Open the feed of every partition before anybody has to wait for what is read of it."""
    async with AsyncExitStack() as stack:
        readers = [stack.enter_async_context(open_feed(filler.settings, mark.partition)) for mark in marks]
        yield dict(zip([mark.partition for mark in marks], await asyncio.gather(*readers), strict=True))


async def _exchange_now(
    connection: Connection, filler: Filler, readers: Mapping[int, LogReader], wait_ms: int
) -> float:
    """The transaction of the module's docstring.

    Raises:
        BatchAborted: a lock was not to be had in time; nothing has happened.
        StamplineError: something stands on the live table that cannot be moved.
    """
    name = filler.name
    async with connection.transaction(isolation="read_committed"):
        await _bound(connection, lock_ms=_WAIT_ALONE_MS)
        if name == file_history.NAME:
            await connection.execute(statement("lock_partitions"))
        await connection.execute(f"LOCK TABLE {filler.schema}.{name} IN ACCESS EXCLUSIVE MODE")
        await _bound(connection, lock_ms=wait_ms)
        await connection.execute(statement("lock_writers"), WRITERS_LOCK)
        started = time.perf_counter()
        await copies.align(connection, name, filler.schema)
        await _close_gap(connection, filler, readers)
        places = [row["place"] for row in await _find_views(connection, name)]
        # One bound for all of these locks together: a reader may wait for one of them while he holds another.
        await _bound(connection, lock_ms=wait_ms, statement_ms=wait_ms)
        await connection.execute(f"LOCK TABLE {', '.join([*places, f'{LIVE}.{name}'])} IN ACCESS EXCLUSIVE MODE")
        await _bound(connection, lock_ms=wait_ms)
        await connection.execute(statement("qualify_names"))
        views = await _find_views(connection, name)
        if filler.schema == OLD:
            await copies.move(connection, name, OLD, SHADOW)
            await connection.execute(statement("take_back_watermarks"), name)
            await connection.execute(statement("forget_watermarks", OLD), name)
        await connection.execute(statement("keep_old_watermarks"), name, datetime.now(UTC))
        await connection.execute(statement("restore_watermarks"), name)
        await connection.execute(statement("forget_watermarks"), name)
        await copies.move(connection, name, LIVE, OLD)
        await copies.move(connection, name, SHADOW, LIVE)
        for view in views:
            await connection.execute(view["statement"])
        if name == contents.NAME:
            await connection.execute(statement("drop_contents_seen"))
    return round((time.perf_counter() - started) * 1000, 1)


async def _bound(connection: Connection, *, lock_ms: int, statement_ms: int = 0) -> None:
    await connection.execute(statement("bound_waiting"), str(lock_ms), str(statement_ms))


async def _find_views(connection: Connection, name: str) -> Sequence[Any]:
    """Return the views that stand on the live table.

    Raises:
        StamplineError: one keeps rows of its own and would go on to take them from the old table.
    """
    views: Sequence[Any] = await connection.fetch(statement("dependents"), name, LIVE)
    fixed = [view["place"] for view in views if not view["replaceable"]]
    if fixed:
        raise StamplineError(
            f"materialized view {', '.join(fixed)} stands on the table {LIVE}.{name} itself, and would stay on the old "
            f"one: let it read the view {name}"
        )
    return views


async def _close_gap(connection: Connection, filler: Filler, readers: Mapping[int, LogReader]) -> None:
    """Bring the copy to exactly where the live projection stands, within the transaction that keeps that standing."""
    marks = await copies.live_marks(connection)
    starts = await copies.copy_marks(connection, filler.name, filler.schema)
    moved = [mark for mark in marks if starts.get(mark.partition) != mark]
    if any(mark.partition not in starts or mark.partition not in readers for mark in moved):
        raise BatchAborted("a partition came in the meantime")
    if sum(mark.feed_offset - starts[mark.partition].feed_offset for mark in moved) > _GAP_OFFSETS_MAX:
        raise BatchAborted("the projectors were too fast")
    pieces = await asyncio.gather(
        *(_read(readers[mark.partition], starts[mark.partition].feed_offset, mark.feed_offset) for mark in moved)
    )
    for mark, records in zip(moved, pieces, strict=True):
        batch = decode_feed(records)
        dropped = await connection.fetchval(statement("dropped_history"), mark.partition)
        piece = plan_piece(starts[mark.partition], mark, batch, mark.feed_offset, dropped)
        await filler.write(connection, piece, batch, batch)


async def _read(reader: LogReader, start: int, until: int) -> list[FeedRecord]:
    # The reader believes that a log ends where it saw it end; the live projection has seen more.
    for _ in range(_LOOKS):
        if reader.end < until:
            await reader.find_end()
    if reader.end < until:
        raise BatchAborted("the feed was not told in time")
    return [record async for records in reader.read(start, until) for record in records]


def _is_long(holder: Any) -> bool:
    return (holder["seconds"] or 0) > _LONG_SECONDS


def _tell_holders(name: str, seconds: float, holders: Sequence[Any], said: str) -> str:
    """Say in one line who is in the way; of several, those that have been for long."""
    named = [holder for holder in holders if holder["seconds"] is None or _is_long(holder)]
    who = "; ".join(
        f"process {holder['pid']} ({holder['application'] or 'unnamed'}, role {holder['role'] or 'unknown'}"
        + (f", {holder['state']}" if holder["state"] else "")
        + (f", for {holder['seconds']:.0f} s" if holder["seconds"] is not None else "")
        + ")"
        for holder in named
    )
    if not who:
        return f"the table of {name} was in use all the time for {seconds:g} s ({said}): try it again when less goes on"
    return (
        f"the table of {name} was in use for {seconds:g} s by {who}: end that transaction, or have PostgreSQL end it "
        f"(SELECT pg_terminate_backend({named[0]['pid']})), and try it again"
    )
