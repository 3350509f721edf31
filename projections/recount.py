"""Counting `contents` from a feed in which changes may be missing anywhere, because compaction has taken them.

What a change says of its file's content before was perhaps never counted. So what was counted for each file is
remembered beside the rebuilt table, and a file whose first change in a batch does not continue from that begins anew,
like one that was never seen.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping
from datetime import datetime
from typing import Any, NamedTuple

from msgspec.structs import replace

from pipeline.events import Before, Change, FileState
from pipeline.postgres import Connection
from projections import contents
from projections.copies import statement
from projections.feed import FeedBatch
from projections.files import uri_key


class Counted(NamedTuple):
    """Rows of `contents` to add, and those that take away what was counted for files that begin anew."""

    rows: list[tuple[Any, ...]]
    taken_away: list[tuple[Any, ...]]


async def count_contents(connection: Connection, batch: FeedBatch) -> Counted:
    """Return the rows of a batch, and remember within the caller's transaction what is counted with them."""
    first: dict[bytes, Change] = {}
    last: dict[bytes, FileState] = {}
    for key, change in zip(batch.keys, batch.changes, strict=True):
        if change.state is not None and change.state.version > 0:
            first.setdefault(key, change)
            last[key] = change.state
    keys = {uri_key(key): key for key in first}
    found = await connection.fetch(statement("find_seen"), list(keys))
    counted = {keys[row["uri_key"].hex]: row for row in found}
    anew = {key for key, change in first.items() if not _follows(change, counted.get(key))}
    await connection.execute(
        statement("mark_seen"),
        list(keys),
        [_live_digest(state) for state in last.values()],
        [None if state.deleted else state.size for state in last.values()],
        [key in anew for key in last],
    )
    broken = [counted[key] for key in anew & counted.keys() if counted[key]["digest"] is not None]
    sizes = {row["digest"]: row["size"] for row in broken}
    taken = Counter(row["digest"] for row in broken)
    told = await _with_times(connection, batch, {key: first[key] for key in anew})
    return Counted(
        contents.rows(told, unseen=anew | (first.keys() - counted.keys())),
        [(digest, sizes[digest], -taken[digest], None, None) for digest in sorted(taken)],
    )


def _follows(change: Change, counted: Any) -> bool:
    """Tell whether a file's first change in a batch continues from what was counted for the file before."""
    before: FileState | Before | None = change.before if change.outcome == "committed" else change.state
    if counted is None:
        # Only a first version has nothing before it.
        return before is None and change.state is not None and change.state.version == 1
    digest: bytes | None = counted["digest"]
    return digest == _live_digest(before)


async def _with_times(connection: Connection, batch: FeedBatch, anew: Mapping[bytes, Change]) -> FeedBatch:
    """Mend the times of states whose own change is gone.

    When Kafka got the input of such a state is not known, only when it was stamped, which is a little later. The live
    table knows between which times its content was seen.
    """
    untimed: dict[int, FileState] = {}
    for change in anew.values():
        if change.state is not None and change.outcome not in {"committed", "unchanged"}:
            untimed[id(change)] = change.state
    digests: Collection[bytes] = {digest for state in untimed.values() if (digest := _live_digest(state)) is not None}
    if not digests:
        return batch
    rows = await connection.fetch(statement("live_times"), list(digests))
    times = {row["digest"]: (row["first_seen_at"], row["last_seen_at"]) for row in rows}

    def mend(change: Change) -> Change:
        state = untimed.get(id(change))
        bounds = None if state is None else times.get(_live_digest(state))
        if state is None or bounds is None:
            return change
        return replace(change, state=replace(state, stamped_at=_clamp(state.stamped_at, *bounds)))

    return replace(batch, changes=[mend(change) for change in batch.changes])


def _clamp(moment: datetime, earliest: datetime, latest: datetime) -> datetime:
    return max(earliest, min(moment, latest))


def _live_digest(state: FileState | Before | None) -> bytes | None:
    return None if state is None or state.deleted else state.digest
