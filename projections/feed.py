"""The feed of the projections: the changelog of table `files`, decoded a batch at a time.

A batch is a few lists side by side rather than an object for each change, because a projector takes a hundred thousand
changes a second. Every projection reads the same batch.

Pure: imports neither faust, asyncio, asyncpg nor os.
"""

from __future__ import annotations

from collections.abc import Iterable
from datetime import datetime
from typing import Protocol

import msgspec
from msgspec import Struct

from pipeline.errors import RecoveryFailed
from pipeline.events import PROGRESS_KEY, Change, decode_change, decode_progress


class FeedRecord(Protocol):
    """What is needed of a record of the changelog; aiokafka's records fit."""

    @property
    def key(self) -> bytes | None:
        """The uri in UTF-8, or `PROGRESS_KEY`."""

    @property
    def value(self) -> bytes | None:
        """The encoded change or progress; None is a tombstone."""

    @property
    def offset(self) -> int:
        """Where the record stands in the feed."""


class FeedBatch(Struct, frozen=True):
    """The changes of a piece of one partition's feed, in order.

    `keys[i]` is the uri of `changes[i]` in UTF-8. `next_input_offset` is the next input to come after this piece, or
    None where the piece does not say; it may be past the last change, for an input without a uri leaves no change.
    """

    keys: list[bytes]
    changes: list[Change]
    next_input_offset: int | None

    @property
    def event_time(self) -> datetime | None:
        """When Kafka got the newest event of the batch; None without a change."""
        return self.changes[-1].recorded_at if self.changes else None


def decode_feed(records: Iterable[FeedRecord]) -> FeedBatch:
    """Decode consecutive records of one partition; tombstones say nothing to a projection and are left out.

    Raises:
        RecoveryFailed: a record is not what our reducer writes; names its offset.
    """
    keys: list[bytes] = []
    changes: list[Change] = []
    next_input_offset: int | None = None
    offset = -1
    try:
        for record in records:
            value = record.value
            if value is None:
                continue
            offset = record.offset
            key = record.key
            if key == PROGRESS_KEY:
                next_input_offset = decode_progress(value).next_input_offset
            elif key is None:
                raise RecoveryFailed(f"the record at offset {offset} of the feed has no key")
            else:
                change = decode_change(value)
                keys.append(key)
                changes.append(change)
                next_input_offset = change.input_offset + 1
    except msgspec.DecodeError as exc:
        raise RecoveryFailed(f"the record at offset {offset} of the feed cannot be decoded: {exc}") from exc
    return FeedBatch(keys, changes, next_input_offset)
