"""Compare a copy of a projection with the live one, while that is being written.

Both sides are counted and summed up at exactly the same watermarks: the live one in one snapshot, the copy once it has
been brought to the marks of that snapshot. The time of the projection is left out: it says when, not what.

A difference is told, and forbids nothing: to repair a damaged table is what a rebuild is for.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from pipeline.postgres import Connection, PostgresConnectionManager
from pipeline.settings import Settings
from projections import activity, contents, copies
from projections.copies import WHOLE_TABLE_SECONDS, statement
from projections.rebuild import Filler, Tally
from projections.storage import LIVE, SHADOW


@dataclass(frozen=True, slots=True)
class PartitionSum:
    """One partition, or what belongs to none (None), on both sides."""

    partition: int | None
    live_rows: int
    rows: int
    equal: bool


@dataclass(frozen=True, slots=True)
class Comparison:
    """A projection and its copy, partition by partition, and what was done to make the copy."""

    projection: str
    tally: Tally
    partitions: list[PartitionSum]

    @property
    def equal(self) -> bool:
        """Whether both sides are the same."""
        return all(item.equal for item in self.partitions)


async def rebuild(
    settings: Settings,
    manager: PostgresConnectionManager,
    name: str,
    report: Callable[[Tally], None] = lambda _tally: None,
) -> Comparison:
    """Fill a shadow of projection `name`, or go on with it, and compare it with the live one.

    It may be cancelled at any moment; the next call goes on.

    Raises:
        StamplineError: as `copies.guarded`, `copies.align` and `Filler.advance`.
    """
    async with copies.guarded(manager, name) as guard:
        if not await copies.exists(guard, name, SHADOW):
            await copies.create_shadow(guard, name)
        filler = Filler(settings, manager, name, SHADOW, report)
        await filler.follow()
        return await compare(filler, guard)


async def compare(filler: Filler, connection: Connection) -> Comparison:
    """Bring the copy to where the live projection stands, and compare them.

    Args:
        filler: brings the copy.
        connection: one that the caller holds; a table of its session is needed now and then.
    """
    name = filler.name
    # What the feed cannot tell the live table knows; but what it knows it has to know at the same marks.
    adopting = name == contents.NAME and filler.schema == SHADOW
    adopting = adopting and await connection.fetchval(statement("count_incomplete")) > 0
    await connection.execute(statement("drop_live_contents"))
    async with connection.transaction(isolation="repeatable_read"):
        await connection.execute(statement("compare_gently"))
        marks = await copies.live_marks(connection)
        if adopting:
            await connection.execute(statement("keep_live_contents"), timeout=WHOLE_TABLE_SECONDS)
        live = await _sums(connection, name, LIVE)
    await filler.advance(marks)
    if adopting:
        await connection.execute(statement("adopt_contents"), timeout=WHOLE_TABLE_SECONDS)
        await connection.execute(statement("drop_live_contents"))
    if name == activity.NAME:
        async with connection.transaction(isolation="read_committed"):
            await connection.execute(statement("forget_old_activity", filler.schema), timeout=WHOLE_TABLE_SECONDS)
            await connection.execute(statement("adopt_old_activity", filler.schema), timeout=WHOLE_TABLE_SECONDS)
    async with connection.transaction(isolation="read_committed"):
        await connection.execute(statement("compare_gently"))
        copy = await _sums(connection, name, filler.schema)
    nothing = (0, None)
    return Comparison(
        name,
        filler.tally,
        [
            PartitionSum(
                partition,
                live.get(partition, nothing)[0],
                copy.get(partition, nothing)[0],
                live.get(partition) == copy.get(partition),
            )
            for partition in sorted(live.keys() | copy.keys(), key=lambda number: -1 if number is None else number)
        ],
    )


async def _sums(connection: Connection, name: str, schema: str) -> dict[int | None, tuple[int, Any]]:
    """Return rows and checksum of one side, by partition."""
    rows = await connection.fetch(statement(f"sum_{name}", schema), timeout=WHOLE_TABLE_SECONDS)
    return {row["partition"]: (row["rows"], row["checksum"]) for row in rows}
