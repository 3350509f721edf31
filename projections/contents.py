"""Projection `contents`: per digest, how many live files have it, and when it was first and last seen.

Additive: a batch gives what it adds and takes away, so that each change must be counted exactly once. That is what the
watermark is for.

Pure: imports neither faust, asyncio, asyncpg nor os.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from datetime import datetime
from operator import itemgetter
from typing import Any, Final

from msgspec import Struct

from pipeline.events import Before, FileState
from projections.feed import FeedBatch

#: The name of this projection in the watermarks.
NAME: Final = "contents"

#: The columns of the tuples that `rows` returns, in their order. `copies` is what to add, and may be negative.
COLUMNS: Final = ("digest", "size", "copies", "first_seen_at", "last_seen_at")

_Delta = tuple[bytes, int | None, int, datetime | None]


class _Content(Struct, gc=False):
    """What a batch tells of one digest: its size in bytes, the copies to add, and when it was seen in the batch."""

    size: int | None
    copies: int
    first_seen_at: datetime | None
    last_seen_at: datetime | None


def rows(batch: FeedBatch, *, unseen: Collection[bytes] | None = None) -> list[tuple[Any, ...]]:
    """Return what `batch` adds to each digest, one row per digest, sorted by the digest.

    A commit takes one copy from the content that the file had and adds one to that which it has now. A content is seen
    where an input that is committed or unchanged has it, at the time when Kafka got that input. A row for a content
    that only loses copies has None for both times: somebody has seen it before, and there is a row to take from.

    Args:
        batch: a piece of the feed.
        unseen: for a feed that begins in the middle, because compaction has deleted the older changes of each file:
            the files (uri in UTF-8) that no batch before this one told of. The first state of such a file is new,
            whatever change brings it; what the change replaced was never counted. None = the feed is whole.
    """
    contents: dict[bytes, _Content] = {}
    for digest, size, copies, seen_at in _deltas(batch, set(unseen or ())):
        content = contents.get(digest)
        if content is None:
            contents[digest] = _Content(size, copies, seen_at, seen_at)
            continue
        content.copies += copies
        if seen_at is None:
            continue
        if content.first_seen_at is None or seen_at < content.first_seen_at:
            content.first_seen_at = seen_at
        if content.last_seen_at is None or seen_at > content.last_seen_at:
            content.last_seen_at = seen_at
    return [
        (digest, content.size, content.copies, content.first_seen_at, content.last_seen_at)
        for digest, content in sorted(contents.items(), key=itemgetter(0))
    ]


def _deltas(batch: FeedBatch, unseen: set[bytes]) -> Iterator[_Delta]:
    """Tell each copy that comes or goes and each sighting: digest, size, copies to add, seen at."""
    for key, change in zip(batch.keys, batch.changes, strict=True):
        state = change.state
        if state is None:
            continue
        outcome = change.outcome
        digest = _live_digest(state)
        if unseen and key in unseen and state.version > 0:
            unseen.remove(key)
            if digest is not None:
                seen = outcome in {"committed", "unchanged"}
                yield digest, state.size, 1, change.recorded_at if seen else state.stamped_at
        elif outcome == "committed":
            before = change.before
            if before is not None:
                gone = _live_digest(before)
                if gone is not None:
                    yield gone, before.size, -1, None
            if digest is not None:
                yield digest, state.size, 1, change.recorded_at
        elif outcome == "unchanged" and digest is not None:
            yield digest, state.size, 0, change.recorded_at


def _live_digest(state: FileState | Before) -> bytes | None:
    """Return the content that a state counts for, None where there is none."""
    return None if state.deleted else state.digest
