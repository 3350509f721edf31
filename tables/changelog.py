"""Recovery: brings a partition's store up to the end of its changelog, in batches of committed records.

Every value is decoded before it is stored (0.4 µs each), so what is in a store can be read, and a record that nobody of
ours has written stops the partition where it stands instead of being met by the fold weeks later.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Final

import msgspec

from pipeline.errors import PositionLost, RecoveryFailed
from pipeline.events import PROGRESS_KEY, Change, Progress, decode_change, decode_progress
from pipeline.logreader import LogReader
from pipeline.settings import Settings
from tables.files import resume
from tables.store import Mark, PartitionStore

#: Gets the number of records read so far and the number of offsets that are left.
Report = Callable[[int, int], None]

#: Loaded at once: 8 ms of work, after which others on the loop have their turn.
_LOAD_RECORDS_MAX: Final = 2_500


async def restore(
    settings: Settings,
    topic: str,
    partition: int,
    store: PartitionStore,
    *,
    until: int | None = None,
    report: Report | None = None,
) -> int:
    """Read a changelog from the store's position to its end (or to offset `until`) into the store.

    Args:
        settings: where Kafka is.
        topic: the changelog.
        partition: its partition.
        store: what it is read into; a piece at a time, so a restore that is cut off goes on from there.
        until: the offset to stop before; None = the end.
        report: is told after each piece how far it has come.

    Returns:
        How many records were read.

    Raises:
        RecoveryFailed: the changelog is not the one that the store was made from, or a record cannot be read; the store
            is as it was before the piece with that record.
        ServiceUnavailable: Kafka does not answer, or the disk does not take it.
    """
    count = 0
    async with LogReader(settings, topic, partition) as reader:
        try:
            await _check_bounds(reader, store)
            # From the last progress record, and not from after it: one look tells whether it is the same log.
            mark = store.mark
            async for records in reader.read(mark.offset if mark else store.position, until, _LOAD_RECORDS_MAX):
                if mark is not None:
                    _compare(mark, records[0])
                    mark = None
                piece = records
                if records[0].offset < store.position:
                    piece = [record for record in records if record.offset >= store.position]
                load(store, piece, max(reader.position, store.position))
                count += len(piece)
                if report is not None:
                    report(count, max(0, (reader.end if until is None else until) - reader.position))
        except PositionLost as exc:
            raise RecoveryFailed(
                f"{exc}: it is not the log that the store was made from, or was cut: {store.remedy}"
            ) from exc
        # The last offsets are a marker's, or of records that were aborted.
        if reader.position > store.position:
            load(store, (), reader.position)
    return count


def load(store: PartitionStore, records: Sequence[Any], position: int) -> None:
    """Take a piece of a changelog into a store.

    The progress of the store is then that at `position`, also where the piece ends between two progress records.

    Args:
        store: where it goes.
        records: the changelog's records as aiokafka gives them, in order, none of which the store has yet.
        position: the offset after them.

    Raises:
        RecoveryFailed: a record cannot be read; nothing of the piece was taken.
        ServiceUnavailable: the disk does not take it; nothing of the piece was taken.
    """
    changes: dict[bytes, bytes] = {}
    gone: set[bytes] = set()
    progress = store.progress
    mark: Mark | None = None
    tail: list[Change] = []
    for record in records:
        key, value = record.key, record.value
        try:
            if key == PROGRESS_KEY:
                progress, mark = _read_progress(record)
                tail.clear()
            elif value is None:
                gone.add(_checked(key))
                changes.pop(key, None)
            else:
                tail.append(decode_change(value))
                changes[_checked(key)] = value
        except (msgspec.MsgspecError, ValueError) as exc:
            raise _unreadable(record, exc) from exc
    if gone:
        gone -= changes.keys()
    store.apply(changes.items(), resume(progress, tail), position, mark=mark, gone=gone)


def _read_progress(record: Any) -> tuple[Progress, Mark]:
    if record.value is None:
        raise ValueError("it has no value")
    return decode_progress(record.value), Mark(record.offset, record.value)


def _checked(key: bytes | None) -> bytes:
    """Return the key of a change: a uri in UTF-8, which is not empty and has no NUL.

    Raises:
        ValueError: it is something else; says what.
    """
    if not key:
        raise ValueError("it has no key")
    if key[0] == 0:
        raise ValueError("its key begins with NUL, as no uri does")
    key.decode()
    return key


async def _check_bounds(reader: LogReader, store: PartitionStore) -> None:
    """Make sure that the log begins before the store's position, or there, and does not end before it.

    Raises:
        PositionLost: it does not, so the store would have more than the log, or a hole.
    """
    await reader.require(store.position)
    if 0 < store.position < reader.begin:
        raise PositionLost(f"{reader.place}: offsets {store.position} to {reader.begin - 1} are gone")


def _compare(mark: Mark, record: Any) -> None:
    """Compare the first record that was read with the last progress record that the store has taken.

    Raises:
        PositionLost: it is another one. A record that compaction has removed tells nothing.
    """
    if record.offset == mark.offset and (record.key, record.value) != (PROGRESS_KEY, mark.value):
        raise PositionLost(
            f"{record.topic} partition {record.partition} offset {mark.offset} is not the record that was read there"
        )


def _unreadable(record: Any, exc: Exception) -> RecoveryFailed:
    kind = "progress record" if record.key == PROGRESS_KEY else "change"
    return RecoveryFailed(
        f"{record.topic} partition {record.partition} offset {record.offset} is no {kind} ({exc}). Was it written by a "
        "newer version? Run that one. If not, somebody else writes to this topic: end that, and copy the topic without "
        "the record; the partition waits"
    )
