"""The hasher's pure half: every record gives exactly one stamp, chained to the one before, and no record breaks it."""

from __future__ import annotations

import base64
import json
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from aiokafka.structs import ConsumerRecord
from blake3 import blake3
from hypothesis import example, given
from hypothesis import strategies as st

from pipeline.contents import Digest
from pipeline.errors import ContentUnavailable
from pipeline.events import ATTEMPT_HEADER, RECORD_MAX_BYTES, Stamp, decode_stamp
from pipeline.records import Record
from pipeline.stamps import Finding, read_batch, stamp_batch

pytestmark = pytest.mark.unit

NOW = datetime(2026, 11, 23, 12, tzinfo=UTC)
URI = "file:///data/a.bin"
INLINE_MAX_BYTES = 16


def make_record(
    value: bytes | None,
    *,
    key: bytes | None = URI.encode(),
    offset: int = 0,
    headers: tuple[tuple[str, Any], ...] = (),
    timestamp: int = 1_795_435_200_000,
) -> Any:
    """Make a record as aiokafka consumes it."""
    return ConsumerRecord("file-events", 3, offset, timestamp, 0, key, value, None, 0, 0, headers)


def make_value(**changes: Any) -> bytes:
    """Make a valid event, with changes."""
    event = {"event_id": "e1", "uri": URI, "op": "created", "occurred_at": "2026-11-23T09:00:00Z"}
    return json.dumps(event | changes).encode()


def stamp_all(
    records: list[Any], fetched: list[Finding] | None = None, previous_offset: int | None = None
) -> tuple[list[Stamp], list[Record], list[Record]]:
    """Return the decoded stamps, their records and the dead letters of a batch."""
    read = read_batch(records, inline_max_bytes=INLINE_MAX_BYTES)
    stamps, letters = stamp_batch(read, fetched or [], previous_offset=previous_offset, now=NOW)
    return [decode_stamp(record.value or b"") for record in stamps], stamps, letters


def base64_of(content: bytes) -> str:
    """Encode a content as JSON carries it."""
    return base64.b64encode(content).decode()


@pytest.mark.parametrize("content", [b"", b"x", bytes(range(INLINE_MAX_BYTES))])
def test_inline_content_is_hashed_at_once(content: bytes) -> None:
    """The digest is BLAKE3-256 of the bytes, the size theirs; nothing is to be fetched."""
    record = make_record(make_value(content=base64_of(content)))

    assert not read_batch([record], inline_max_bytes=INLINE_MAX_BYTES)[0].wanted
    [stamp], _, letters = stamp_all([record])
    assert (stamp.digest, stamp.size) == (blake3(content).digest(), len(content))
    assert not letters


def test_a_stamp_says_what_the_event_said() -> None:
    """Every field is carried over; metadata is JSON with sorted keys; times are Kafka's and the hasher's."""
    value = make_value(
        content=base64_of(b"x"),
        namespace="n",
        workflow_id="w",
        expected_version=4,
        metadata={"b": 1, "a": "ü"},
        size=99,
    )

    [stamp], [record], _ = stamp_all([make_record(value, offset=8)], previous_offset=5)

    assert stamp == Stamp(
        input_offset=8,
        previous_offset=5,
        uri=URI,
        event_id="e1",
        op="created",
        namespace="n",
        occurred_at=datetime(2026, 11, 23, 9, tzinfo=UTC),
        recorded_at=datetime.fromtimestamp(1_795_435_200, UTC),
        stamped_at=NOW,
        digest=blake3(b"x").digest(),
        size=1,
        workflow_id="w",
        expected_version=4,
        metadata='{"a":"ü","b":1}'.encode(),
        original=value,
    )
    assert record.key == URI.encode()


def test_only_an_event_that_may_come_again_is_carried_along() -> None:
    """The original is needed where a version is expected, and would be dead weight anywhere else."""
    [without, expecting], _, _ = stamp_all(
        [
            make_record(make_value(op="deleted", expected_version=version), offset=i)
            for i, version in enumerate([None, 1])
        ]
    )
    assert (without.original is None, expecting.original is None) == (True, False)


@pytest.mark.parametrize(("op", "more"), [("deleted", {}), ("moved", {"target_uri": "file:///b"})])
def test_a_file_that_is_gone_needs_no_content(op: str, more: dict[str, str]) -> None:
    """Its content is neither fetched nor hashed, even if some came along."""
    record = make_record(make_value(op=op, content=base64_of(b"x"), **more))

    assert not read_batch([record], inline_max_bytes=INLINE_MAX_BYTES)[0].wanted
    [stamp], _, letters = stamp_all([record])
    assert (stamp.op, stamp.digest, stamp.size, letters) == (op, None, None, [])


def test_findings_go_to_the_records_that_wanted_them() -> None:
    """The fetched digests are in the order of the records without content; the others keep their own."""
    records = [
        make_record(make_value(), offset=0),
        make_record(make_value(content=base64_of(b"x")), offset=1),
        make_record(b"broken", offset=2),
        make_record(make_value(), offset=3),
        make_record(make_value(op="deleted"), offset=4),
        make_record(make_value(), offset=5),
    ]
    found: list[Finding] = [
        Digest(b"\x01" * 32, 1),
        ContentUnavailable("content_missing", "gone"),
        Digest(b"\x02" * 32, 2),
    ]

    read = read_batch(records, inline_max_bytes=INLINE_MAX_BYTES)
    stamps, _, letters = stamp_all(records, found)

    assert [item.wanted for item in read] == [True, False, False, True, False, True]
    assert [stamp.size for stamp in stamps] == [1, 1, None, None, None, 2]
    assert [stamp.reason for stamp in stamps] == [None, None, "undecodable", "content_missing", None, None]
    assert len(letters) == 2


@pytest.mark.parametrize("previous_offset", [None, 4])
def test_stamps_are_chained(previous_offset: int | None) -> None:
    """Each names the record before it, rejected ones too; offsets may have gaps."""
    offsets = [5, 6, 9, 20]
    records = [make_record(b"?" if offset == 6 else make_value(op="deleted"), offset=offset) for offset in offsets]

    stamps, _, _ = stamp_all(records, previous_offset=previous_offset)

    assert [stamp.input_offset for stamp in stamps] == offsets
    assert [stamp.previous_offset for stamp in stamps] == [previous_offset, *offsets[:-1]]


@pytest.mark.parametrize(
    ("value", "key", "reason", "uri"),
    [
        (None, URI.encode(), "undecodable", None),
        (b"\xff{", URI.encode(), "undecodable", None),
        (b"x" * (RECORD_MAX_BYTES + 1), URI.encode(), "too_large", None),
        (make_value(op="renamed"), URI.encode(), "invalid_event", URI),
        (make_value(uri=""), URI.encode(), "invalid_event", None),
        (make_value(uri="a\x00b"), b"a\x00b", "invalid_event", None),
        (make_value(uri="ü" * 4096), URI.encode(), "invalid_event", None),
        (make_value(), None, "wrong_key", URI),
        (make_value(), b"other", "wrong_key", URI),
        (make_value(content=base64_of(b"x" * (INLINE_MAX_BYTES + 1))), URI.encode(), "too_large", URI),
    ],
)
def test_a_rejected_record_has_a_stamp_and_a_dead_letter(
    value: bytes | None, key: bytes | None, reason: str, uri: str | None
) -> None:
    """The stamp has the reason, no digest, and the uri where a usable one could be read."""
    [stamp], [record], [letter] = stamp_all([make_record(value, key=key, offset=7)], previous_offset=6)

    assert (stamp.reason, stamp.uri, stamp.digest, stamp.size) == (reason, uri, None, None)
    assert (stamp.input_offset, stamp.previous_offset, stamp.original) == (7, 6, None)
    assert stamp.detail
    assert record.key == key
    assert (letter.key, letter.value) == (key, value)


@pytest.mark.parametrize("changes", [{}, {"content": base64_of(b"x" * (INLINE_MAX_BYTES + 1))}])
def test_an_event_whose_content_is_not_to_be_had_keeps_its_facts(changes: dict[str, str]) -> None:
    """The history can say when it happened and for which workflow."""
    fault = ContentUnavailable("content_missing", "there is no such file")

    [stamp], _, _ = stamp_all([make_record(make_value(workflow_id="w", namespace="n", **changes))], [fault])

    assert stamp.reason is not None
    assert (stamp.event_id, stamp.op, stamp.namespace, stamp.workflow_id) == ("e1", "created", "n", "w")
    assert stamp.occurred_at == datetime(2026, 11, 23, 9, tzinfo=UTC)


def test_a_dead_letter_is_the_record_with_its_story() -> None:
    """Key, value and headers stay the original's; what happened is added as headers."""
    headers: tuple[tuple[str, Any], ...] = (
        ("trace", b"\xff\x00"),
        ("dl-reason", b"from before"),
        (ATTEMPT_HEADER, b"2"),
        ("empty", None),
    )

    _, _, [letter] = stamp_all([make_record(b"broken", key=b"\xfe", offset=41, headers=headers)])

    assert (letter.key, letter.value) == (b"\xfe", b"broken")
    assert tuple(letter.headers[:4]) == headers
    added = dict(letter.headers[4:])
    assert (added.pop("dl-error") or b"").decode().startswith("not a JSON object")
    assert added == {
        "dl-reason": b"undecodable",
        "dl-topic": b"file-events",
        "dl-partition": b"3",
        "dl-offset": b"41",
        "dl-attempts": b"3",
        "dl-time": b"2026-11-23T12:00:00.000+00:00",
    }


@pytest.mark.parametrize(
    ("header", "attempt"),
    [(b"0", 0), (b"7", 7), (b"", 0), (b"-1", 0), (b"x", 0), (None, 0), ("٣".encode(), 0)],
)
def test_the_attempt_is_read_from_its_header(header: bytes | None, attempt: int) -> None:
    """What is no number counts as none."""
    [stamp], _, _ = stamp_all([make_record(make_value(op="deleted"), headers=(("x", b"9"), (ATTEMPT_HEADER, header)))])
    assert stamp.attempt == attempt


def test_an_absurd_attempt_is_a_large_one() -> None:
    """A hostile header neither raises nor passes for a first attempt."""
    [stamp], _, _ = stamp_all([make_record(make_value(op="deleted"), headers=((ATTEMPT_HEADER, b"9" * 5000),))])
    assert 1000 < stamp.attempt < 2**63


@pytest.mark.parametrize("timestamp", [-1, 0, 1_795_435_200_123, 2**63 - 1])
def test_a_producers_clock_may_lie(timestamp: int) -> None:
    """Any timestamp that Kafka can carry becomes an instant."""
    [stamp], _, _ = stamp_all([make_record(make_value(op="deleted"), timestamp=timestamp)])
    epoch = datetime(1970, 1, 1, tzinfo=UTC)
    limit = datetime(9999, 1, 1, tzinfo=UTC)
    assert stamp.recorded_at == (epoch + timedelta(milliseconds=max(timestamp, 0)) if timestamp < 2**60 else limit)


_HEADERS = st.lists(
    st.tuples(st.text(max_size=5) | st.just(ATTEMPT_HEADER), st.none() | st.binary(max_size=8)), max_size=3
).map(tuple)
_BYTES = st.none() | st.binary(max_size=60)


@given(
    st.lists(st.tuples(_BYTES, _BYTES, _HEADERS, st.integers(-1, 2**63 - 1)), max_size=6), st.none() | st.integers(0, 9)
)
@example([(b"\xff", b'{"uri":"\xff"}', (), 0), (None, b'{"uri":"\\ud800"}', (), 0), (None, b"[" * 60, (), 0)], None)
def test_no_bytes_break_the_hasher(
    drawn: list[tuple[bytes | None, bytes | None, tuple[tuple[str, bytes | None], ...], int]], previous: int | None
) -> None:
    """Whatever a producer sends: one stamp for each record, in order, and a dead letter for each rejected one."""
    records = [
        make_record(value, key=key, offset=10 + 2 * i, headers=headers, timestamp=timestamp)
        for i, (key, value, headers, timestamp) in enumerate(drawn)
    ]

    stamps, _, letters = stamp_all(records, [Digest(b"\x00" * 32, 0)] * len(records), previous)

    assert [stamp.input_offset for stamp in stamps] == [record.offset for record in records]
    assert len(letters) == sum(stamp.reason is not None for stamp in stamps)
