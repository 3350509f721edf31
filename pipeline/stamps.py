"""From a batch of file events to stamps and dead letters: the hasher's pure half.

`read_batch` decodes and validates; the caller has the missing contents hashed; `stamp_batch` puts both together.
Every record gives exactly one stamp, chained to the record before it.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any, NamedTuple

from pipeline.contents import Digest
from pipeline.errors import InputRejected
from pipeline.events import (
    ATTEMPT_HEADER,
    GONE_OPS,
    FileEvent,
    Stamp,
    decode_event,
    encode_metadata,
    encode_record,
    sketch_event,
)
from pipeline.hashing import digest_inline
from pipeline.records import Record, dead_letter

Finding = Digest | InputRejected | None


class ReadRecord(NamedTuple):
    """One record, read: its event (None = rejected), and its digest, its fault, or None = content to be fetched.

    An event that needs no content has an event and a finding of None too; `wanted` tells them apart.
    """

    record: Any
    event: FileEvent | None
    finding: Finding
    wanted: bool


def read_batch(records: Sequence[Any], *, inline_max_bytes: int) -> list[ReadRecord]:
    """Decode every record of a batch and hash the contents that came inline."""
    return [_read(record, inline_max_bytes) for record in records]


def _read(record: Any, inline_max_bytes: int) -> ReadRecord:
    try:
        event = decode_event(record.key, record.value)
    except InputRejected as exc:
        return ReadRecord(record, None, exc, wanted=False)
    content = event.content
    if event.op in GONE_OPS:
        return ReadRecord(record, event, None, wanted=False)
    if content is None:
        return ReadRecord(record, event, None, wanted=True)
    if len(content) > inline_max_bytes:
        fault = InputRejected("too_large", f"{len(content)} bytes of content, the most inline is {inline_max_bytes}")
        return ReadRecord(record, event, fault, wanted=False)
    return ReadRecord(record, event, digest_inline(content), wanted=False)


def stamp_batch(
    read: Sequence[ReadRecord], fetched: Sequence[Finding], *, previous_offset: int | None, now: datetime
) -> tuple[list[Record], list[Record]]:
    """Return the stamps and the dead letters of a batch, to be written to the same partition.

    Args:
        read: what `read_batch` returned.
        fetched: the findings for the records that wanted content, in order.
        previous_offset: offset of the record before the batch; None starts a new chain.
        now: when the batch was hashed.
    """
    stamps: list[Record] = []
    letters: list[Record] = []
    late = iter(fetched)
    for record, event, early, wanted in read:
        finding = next(late) if wanted else early
        if event is None or isinstance(finding, InputRejected):
            assert isinstance(finding, InputRejected)
            stamp = _rejected(record, event, finding, previous_offset, now)
            letters.append(
                dead_letter(record, reason=finding.reason, error=finding.detail, attempts=_attempt(record) + 1, now=now)
            )
        else:
            stamp = _accepted(record, event, finding, previous_offset, now)
        stamps.append(Record(record.key, encode_record(stamp)))
        previous_offset = record.offset
    return stamps, letters


def _accepted(
    record: Any, event: FileEvent, digest: Digest | None, previous_offset: int | None, now: datetime
) -> Stamp:
    return Stamp(
        input_offset=record.offset,
        previous_offset=previous_offset,
        uri=event.uri,
        event_id=event.event_id,
        op=event.op,
        namespace=event.namespace,
        occurred_at=event.occurred_at,
        recorded_at=_recorded_at(record),
        stamped_at=now,
        digest=digest.value if digest is not None else None,
        size=digest.size if digest is not None else None,
        workflow_id=event.workflow_id,
        expected_version=event.expected_version,
        metadata=encode_metadata(event.metadata) if event.metadata else None,
        attempt=_attempt(record),
        original=record.value if event.expected_version is not None else None,
    )


def _rejected(
    record: Any, event: FileEvent | None, fault: InputRejected, previous_offset: int | None, now: datetime
) -> Stamp:
    told = sketch_event(record.value) if event is None else {}
    return Stamp(
        input_offset=record.offset,
        previous_offset=previous_offset,
        uri=event.uri if event is not None else told.get("uri"),
        event_id=event.event_id if event is not None else told.get("event_id"),
        op=event.op if event is not None else told.get("op"),
        namespace=event.namespace if event is not None else told.get("namespace"),
        occurred_at=event.occurred_at if event is not None else None,
        recorded_at=_recorded_at(record),
        stamped_at=now,
        reason=fault.reason,
        detail=fault.detail,
        workflow_id=event.workflow_id if event is not None else None,
    )


def _attempt(record: Any) -> int:
    for name, value in record.headers:
        # A header's value may be null, and Python refuses to read a number of thousands of digits.
        if name == ATTEMPT_HEADER and value and value.isdigit():
            return int(value[:9])
    return 0


def _recorded_at(record: Any) -> datetime:
    """When Kafka got the record; a producer's clock may lie, but not past what a timestamp can hold."""
    return datetime.fromtimestamp(min(max(record.timestamp, 0), 253_370_764_800_000) / 1000, tz=UTC)
