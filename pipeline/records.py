"""Records to write, and dead letters: a record that cannot be used, kept as it came, with why and from where.

Pure. The key, the value and the headers of a dead letter stay the original's; the headers `dl-*` are added.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import Any, NamedTuple


class Record(NamedTuple):
    """One record to write; the topic and the partition are the writer's business."""

    key: bytes | None
    value: bytes | None
    headers: Sequence[tuple[str, bytes]] = ()


def dead_letter(record: Any, *, reason: str, error: str, attempts: int, now: datetime) -> Record:
    """Return the dead letter of a record as aiokafka consumed it.

    Args:
        record: the record.
        reason: stable code, for example `undecodable`.
        error: one sentence for a person.
        attempts: how often it was tried.
        now: when it was given up.
    """
    return dead_letter_of_event(
        Record(record.key, record.value, record.headers),
        topic=record.topic,
        partition=record.partition,
        offset=record.offset,
        reason=reason,
        error=error,
        attempts=attempts,
        now=now,
    )


def dead_letter_of_event(
    original: Record,
    *,
    topic: str,
    partition: int,
    offset: int,
    reason: str,
    error: str,
    attempts: int,
    now: datetime,
) -> Record:
    """Return the dead letter of a record that was read from this topic, partition and offset."""
    facts = (
        ("dl-reason", reason),
        ("dl-error", error),
        ("dl-topic", topic),
        ("dl-partition", str(partition)),
        ("dl-offset", str(offset)),
        ("dl-attempts", str(attempts)),
        ("dl-time", now.isoformat(timespec="milliseconds")),
    )
    encoded = tuple((name, text.encode(errors="replace")) for name, text in facts)
    return Record(original.key, original.value, (*original.headers, *encoded))
