"""Records to write, and dead letters: a record that cannot be used, kept as it came, with why and from where.

The key, the value and the headers of a dead letter stay the original's; the headers `dl-*` are added at the end. What
became of a letter is another record of the same topic, a mark: `replayed` or `dropped`. So whoever reads the topic from
its beginning knows all of it.

Pure: imports neither faust, asyncio, asyncpg nor os.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any, Final, Literal, NamedTuple, get_args

#: The header of an event that was sent in again: which dead letter it comes from.
REPLAY_HEADER: Final = "dl-replay-of"

#: What can become of a dead letter.
MarkStatus = Literal["replayed", "dropped"]

#: The headers of a dead letter after those of the original, in their order.
_FACTS: Final = ("dl-reason", "dl-error", "dl-topic", "dl-partition", "dl-offset", "dl-attempts", "dl-time")
#: All headers of a mark, in their order.
_MARK: Final = ("dl-mark", "dl-topic", "dl-partition", "dl-offset", "dl-time")
_TOPIC: Final = re.compile(r"[A-Za-z0-9._-]{1,249}")
_NUMBER: Final = re.compile(r"[0-9]{1,19}")

Headers = Sequence[tuple[str, bytes | None]]


class Record(NamedTuple):
    """One record to write; the topic and the partition are the writer's business."""

    key: bytes | None
    value: bytes | None
    headers: Headers = ()


class LetterId(NamedTuple):
    """What a dead letter is known by: where its original stands. The topic has its prefix."""

    topic: str
    partition: int
    offset: int

    def __str__(self) -> str:
        return f"{self.topic}:{self.partition}:{self.offset}"


class Letter(NamedTuple):
    """What the headers of a dead letter tell; all but the identity is as it came, in bytes.

    `headers` are those of the original.
    """

    id: LetterId
    headers: Headers
    facts: Mapping[str, bytes]


class Mark(NamedTuple):
    """What became of a dead letter."""

    id: LetterId
    status: MarkStatus


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


def replayed(original: Record, letter: LetterId) -> Record:
    """Return the record that sends the original of a dead letter in again, and names the letter."""
    headers = [(name, value) for name, value in original.headers if not name.startswith("dl-")]
    return Record(original.key, original.value, [*headers, (REPLAY_HEADER, str(letter).encode())])


def read_letter(headers: Headers) -> Letter | None:
    """Return what the headers of a dead letter tell, None where they are not those of one.

    Only the last headers count: an original may have any headers, those of a dead letter among them.
    """
    facts = dict(headers[-len(_FACTS) :])
    if tuple(facts) != _FACTS:
        return None
    told = {name: value for name, value in facts.items() if value is not None}
    identity = _read_id(facts)
    if identity is None or len(told) < len(_FACTS):
        return None
    return Letter(identity, headers[: -len(_FACTS)], told)


def mark_letter(letter: LetterId, status: MarkStatus, now: datetime) -> Record:
    """Return the record that tells what became of a dead letter."""
    values = (status, letter.topic, str(letter.partition), str(letter.offset), now.isoformat(timespec="milliseconds"))
    return Record(None, None, [(name, value.encode()) for name, value in zip(_MARK, values, strict=True)])


def read_mark(headers: Headers) -> Mark | None:
    """Return what a mark tells, None where the headers are not those of one: a mark has no others."""
    if tuple(name for name, _ in headers) != _MARK:
        return None
    facts = dict(headers)
    identity = _read_id(facts)
    for status in get_args(MarkStatus):
        if identity is not None and facts["dl-mark"] == status.encode():
            return Mark(identity, status)
    return None


def _read_id(facts: Mapping[str, bytes | None]) -> LetterId | None:
    values = (facts["dl-topic"], facts["dl-partition"], facts["dl-offset"])
    return parse_letter_id(b":".join(value or b"" for value in values).decode(errors="replace"))


def parse_letter_id(text: str) -> LetterId | None:
    """Return the identity that `TOPIC:PARTITION:OFFSET` tells, None where it is none that Kafka could have."""
    topic, partition, offset = (text.split(":") + [""] * 3)[:3]
    if text.count(":") != 2 or not _TOPIC.fullmatch(topic):  # noqa: PLR2004 - three parts
        return None
    if not _NUMBER.fullmatch(partition) or not _NUMBER.fullmatch(offset):
        return None
    identity = LetterId(topic, int(partition), int(offset))
    return identity if identity.partition < 2**31 and identity.offset < 2**63 else None
