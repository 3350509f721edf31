"""Following a folder: one event for each file that came, changed or went since the walk before.

Walks again and again and compares size, time and inode: nothing is missed, however it came about. The first walk
sends everything, because nothing is known of what was seen before; files that have not changed since then come out
as `unchanged`.
"""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

from pipeline.events import FileEvent, Op
from pipeline.scan import CHUNK_FILES_MAX, EventSink, Found, file_uri, new_event_id, walk

#: Pause between two walks, in s.
PAUSE_SECONDS: Final = 1.0


async def follow(root: Path, producer: EventSink, *, pause_seconds: float = PAUSE_SECONDS) -> None:
    """Send events for what changes below `root`, until cancelled.

    Raises:
        StamplineError: there is nothing at `root`, or what the producer raises.
    """
    known: dict[str, Found] = {}
    while True:
        seen = await asyncio.to_thread(_look, root)
        events = compare(known, seen)
        for start in range(0, len(events), CHUNK_FILES_MAX):
            await producer.send_all(events[start : start + CHUNK_FILES_MAX])
        known = seen
        await asyncio.sleep(pause_seconds)


def compare(known: dict[str, Found], seen: dict[str, Found]) -> list[FileEvent]:
    """Return the events that lead from what was known to what is seen."""
    now = datetime.now(UTC)
    events = [
        _event("created" if path not in known else "modified", found, now)
        for path, found in seen.items()
        if known.get(path) != found
    ]
    events += [_event("deleted", known[path], now) for path in known.keys() - seen.keys()]
    return events


def _event(op: Op, found: Found, now: datetime) -> FileEvent:
    return FileEvent(
        event_id=new_event_id(),
        uri=file_uri(found.path),
        op=op,
        occurred_at=now,
        size=None if op == "deleted" else found.size,
        source="follow",
    )


def _look(root: Path) -> dict[str, Found]:
    return {item.path: item for item in walk(root) if isinstance(item, Found)}
