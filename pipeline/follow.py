"""Following a folder: one event for each file that came, changed or went since the walk before.

Walks again and again and compares size, time and inode: nothing is missed, however it came about. The first walk
sends everything, because nothing is known of what was seen before; files that have not changed since then come out
as `unchanged`.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

from pipeline.events import FileEvent, Op
from pipeline.scan import CHUNK_FILES_MAX, EventSink, Found, Skipped, file_uri, new_event_id, walk

#: Pause between two walks, in s.
PAUSE_SECONDS: Final = 1.0


async def follow(root: Path, producer: EventSink, *, pause_seconds: float = PAUSE_SECONDS) -> None:
    """Send events for what changes below `root`, until cancelled.

    Raises:
        StamplineError: there is nothing at `root`, or what the producer raises.
    """
    known: dict[str, Found] = {}
    while True:
        seen = await asyncio.to_thread(_look, root, known)
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


def _look(root: Path, known: dict[str, Found]) -> dict[str, Found]:
    """Walk once."""
    seen: dict[str, Found] = {}
    skipped: list[Skipped] = []
    for item in walk(root):
        if isinstance(item, Found):
            seen[item.path] = item
        else:
            skipped.append(item)
    return still_there(skipped, known) | seen


def still_there(skipped: Iterable[Skipped], known: dict[str, Found]) -> dict[str, Found]:
    """Return what was known and cannot be looked at now: it is taken to be there still, not gone."""
    hidden = [item.path for item in skipped if item.reason == "unreadable"]
    return {
        path: found
        for path, found in known.items()
        if any(path == folder or path.startswith(folder + os.sep) for folder in hidden)
    }
