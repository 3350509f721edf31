"""A scan: walks folders and sends one event for each regular file.

The walk is the source of truth where a watcher may miss something. It follows no symlink below its roots, reads no
file, and leaves a folder it may not read to the count. A name is bytes to the system, not text: it goes into the uri
percent-encoded, whatever it holds.
Imports os for the walk, and asyncio only to keep it off the loop.
"""

from __future__ import annotations

import asyncio
import os
import stat
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import UTC, datetime
from itertools import chain, islice
from pathlib import Path
from typing import Final, Literal, NamedTuple, Protocol
from urllib.parse import quote_from_bytes

import msgspec

from pipeline.client import Position
from pipeline.errors import InputRejected, StamplineError
from pipeline.events import URI_MAX_BYTES, FileEvent

#: Events per call of the producer: enough for full record batches, little enough for a lively progress bar.
CHUNK_FILES_MAX: Final = 2000

SkipReason = Literal["symlink", "not_regular", "unreadable", "uri_too_long"]


class Found(NamedTuple):
    """A regular file, as the walk saw it. `path` is absolute and may hold surrogates for bytes that are no UTF-8."""

    path: str
    size: int
    modified_ns: int = 0
    inode: int = 0


class Skipped(NamedTuple):
    """Something that the walk left out."""

    path: str
    reason: SkipReason


class ScanResult(msgspec.Struct, kw_only=True):
    """What a scan has come to: at the end, or so far.

    `last_offsets` holds, per partition, the offset after the last event sent: once the projection's watermark has
    reached it, the whole scan is visible.
    """

    files: int = 0
    bytes: int = 0
    skipped: dict[SkipReason, int] = {}
    last_offsets: dict[int, int] = {}

    @property
    def skipped_total(self) -> int:
        """How many things were left out, for whatever reason."""
        return sum(self.skipped.values())


class EventSink(Protocol):
    """What a scan needs of a producer; `pipeline.client.EventProducer` is the real one."""

    async def send_all(self, events: Iterable[FileEvent]) -> list[Position]:
        """Deliver the events and return their positions."""


def walk(root: Path) -> Iterator[Found | Skipped]:
    """Yield every regular file at or below `root`, and everything that was left out.

    Only `root` itself may be a symlink; it is resolved, so that a file has one uri however the scan got there.

    Raises:
        StamplineError: there is nothing at `root`.
    """
    try:
        start = os.path.realpath(root, strict=True)
        status = os.lstat(start)
    except OSError as exc:
        raise StamplineError(f"cannot scan {os.fspath(root)!r}: {exc.strerror}") from exc
    if not stat.S_ISDIR(status.st_mode):
        yield _classified(start, status)
        return
    # A stack instead of recursion, and one open folder at a time: no depth of tree is too deep.
    pending = [start]
    while pending:
        folder = pending.pop()
        try:
            with os.scandir(folder) as entries:
                for entry in entries:
                    seen = _seen(entry)
                    if seen is None:
                        pending.append(entry.path)
                    else:
                        yield seen
        except OSError:
            yield Skipped(folder, "unreadable")


def _seen(entry: os.DirEntry[str]) -> Found | Skipped | None:
    """Return what an entry is; None for a folder."""
    try:
        status = entry.stat(follow_symlinks=False)
    except OSError:
        return Skipped(entry.path, "unreadable")
    return None if stat.S_ISDIR(status.st_mode) else _classified(entry.path, status)


def _classified(path: str, status: os.stat_result) -> Found | Skipped:
    if stat.S_ISLNK(status.st_mode):
        return Skipped(path, "symlink")
    if not stat.S_ISREG(status.st_mode):
        return Skipped(path, "not_regular")
    return Found(path, status.st_size, status.st_mtime_ns, status.st_ino)


def file_uri(path: str) -> str:
    """Return the `file://` uri of an absolute path: the same as `Path.as_uri`, for any name."""
    return "file://" + quote_from_bytes(os.fsencode(path))


def event_for(found: Found, namespace: str = "default", *, now: datetime | None = None) -> FileEvent:
    """Return the event that tells of a file: seen at `now` (default: this moment), with a new event id.

    Raises:
        InputRejected: `uri_too_long`: the encoded path does not fit into a uri.
    """
    uri = file_uri(found.path)
    if len(uri) > URI_MAX_BYTES:
        raise InputRejected("uri_too_long", f"the uri has {len(uri)} bytes, the most is {URI_MAX_BYTES}")
    return FileEvent(
        event_id=new_event_id(),
        uri=uri,
        op="created",
        occurred_at=now or datetime.now(UTC),
        size=found.size,
        namespace=namespace,
        source="scan",
    )


def new_event_id() -> str:
    """Return a new UUID of version 7 as 32 hex digits: unique, and sorted by time."""
    moment = time.time_ns() // 1_000_000
    chance = int.from_bytes(os.urandom(10), "big")
    return f"{moment << 80 | 0x7 << 76 | (chance >> 62 & 0xFFF) << 64 | 0x2 << 62 | chance & (1 << 62) - 1:032x}"


async def scan(
    paths: Sequence[Path],
    producer: EventSink,
    *,
    namespace: str = "default",
    on_progress: Callable[[ScanResult], None] | None = None,
) -> ScanResult:
    """Send an event for every file below `paths`; a file below two of them is sent once for each.

    The walk runs in a thread, one chunk ahead of what is being sent. `on_progress` is called after each chunk.

    Raises:
        StamplineError: there is nothing at a path, or what the producer raises; the events before have been sent.
    """
    result = ScanResult()
    found = chain.from_iterable(walk(path) for path in paths)
    ahead = asyncio.create_task(asyncio.to_thread(_next_chunk, found, namespace))
    try:
        while chunk := await ahead:
            ahead = asyncio.create_task(asyncio.to_thread(_next_chunk, found, namespace))
            await _send_chunk(chunk, producer, result)
            if on_progress is not None:
                on_progress(result)
    finally:
        # The thread cannot be interrupted, but it ends with its chunk; do not leave it behind.
        await asyncio.gather(ahead, return_exceptions=True)
    return result


def _next_chunk(found: Iterator[Found | Skipped], namespace: str) -> list[FileEvent | Skipped]:
    chunk: list[FileEvent | Skipped] = []
    for item in islice(found, CHUNK_FILES_MAX):
        try:
            chunk.append(event_for(item, namespace) if isinstance(item, Found) else item)
        except InputRejected:
            chunk.append(Skipped(item.path, "uri_too_long"))
    return chunk


async def _send_chunk(chunk: list[FileEvent | Skipped], producer: EventSink, result: ScanResult) -> None:
    events = [item for item in chunk if isinstance(item, FileEvent)]
    for partition, offset in await producer.send_all(events):
        result.last_offsets[partition] = max(offset + 1, result.last_offsets.get(partition, 0))
    for item in chunk:
        if isinstance(item, Skipped):
            result.skipped[item.reason] = result.skipped.get(item.reason, 0) + 1
    result.files += len(events)
    result.bytes += sum(event.size or 0 for event in events)
