"""Projection `dead_letters`: whatever is in the topic becomes rows, and the originals can be made again from them."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from typing import Any, NamedTuple

import orjson
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from pipeline.records import (
    LetterId,
    MarkStatus,
    Record,
    dead_letter_of_event,
    mark_letter,
    parse_letter_id,
    read_letter,
    read_mark,
    replayed,
)
from projections.dead_letters import COLUMNS, FOREIGN, NO_LETTER, describe_headers, event_time, restore_headers, rows

pytestmark = pytest.mark.unit

TOPIC = "t-file-events-dlq"
NOW = datetime(2026, 11, 23, 9, tzinfo=UTC)


class DeadRecord(NamedTuple):
    """A record of the topic as aiokafka brings it."""

    key: bytes | None
    value: bytes | None
    headers: Sequence[tuple[str, bytes | None]]
    offset: int = 0
    partition: int = 3
    timestamp: int = 1_795_424_400_000
    topic: str = TOPIC


def make_letter(
    original: Record, offset: int = 7, *, reason: str = "undecodable", attempts: int = 1, at: int = 0
) -> DeadRecord:
    """Make the dead letter of an original at this offset, standing at offset `at`."""
    letter = dead_letter_of_event(
        original,
        topic="t-file-events",
        partition=3,
        offset=offset,
        reason=reason,
        error="no JSON",
        attempts=attempts,
        now=NOW,
    )
    return DeadRecord(*letter, offset=at)


def make_mark(offset: int, status: MarkStatus) -> DeadRecord:
    """Make the mark of the letter whose original is at this offset."""
    return DeadRecord(*mark_letter(LetterId("t-file-events", 3, offset), status, NOW), offset=100)


def as_dicts(*records: DeadRecord) -> list[dict[str, Any]]:
    """Return the rows by column."""
    return [dict(zip(COLUMNS, row, strict=True)) for row in rows(records)]


NAMES = st.one_of(
    st.sampled_from(["dl-topic", "dl-reason", "dl-mark", "dl-time", "stampline-attempt", "a\x00b", ""]),
    st.text(max_size=8),
    st.characters(categories=["Cs"]),
)
BYTES = st.none() | st.sampled_from([b"", b"\x00", b"\xff\xfe", "\ud7ff\U0010ffff".encode()]) | st.binary(max_size=20)
HEADERS = st.lists(st.tuples(NAMES, BYTES), max_size=12)
RECORDS = st.builds(
    DeadRecord,
    BYTES,
    BYTES,
    HEADERS,
    offset=st.integers(0, 2**63 - 1),
    partition=st.just(3),
    topic=st.just(TOPIC),
    timestamp=st.integers(-(2**63), 2**63 - 1),
)


@given(key=BYTES, value=BYTES, headers=HEADERS)
def test_the_original_can_be_made_again(key: bytes | None, value: bytes | None, headers: Any) -> None:
    """Key, value and headers of a letter's row are exactly those of the original, whatever headers that has."""
    [row] = as_dicts(make_letter(Record(key, value, headers)))

    assert (row["topic"], row["partition"], row["offset"]) == ("t-file-events", 3, 7)
    assert (row["key_bytes"], row["payload"], restore_headers(row["headers"])) == (key, value, headers)
    assert (row["reason"], row["error"], row["attempts"], row["dead_at"]) == ("undecodable", "no JSON", 1, NOW)


@given(st.lists(RECORDS, max_size=5))
@example([DeadRecord(None, None, [("dl-topic", None)])])
def test_any_record_gives_rows_that_postgres_can_store(records: list[DeadRecord]) -> None:
    """No text holds NUL or half a surrogate, no number or time is out of range, and no two rows are the same letter."""
    found = as_dicts(*records)

    assert len({(row["topic"], row["partition"], row["offset"]) for row in found}) == len(found)
    for row in found:
        texts = [row[name] for name in ("topic", "reason", "error", "headers")] + ([row["key"]] if row["key"] else [])
        texts += [text for entry in orjson.loads(row["headers"]) for text in entry.values() if text]
        assert not any("\x00" in text for text in texts)
        assert all(text.encode() for text in texts if text)
        assert 0 <= row["offset"] < 2**63
        assert 0 <= row["attempts"] < 2**31
        assert row["dead_at"].astimezone(UTC).year >= 1


@given(RECORDS)
def test_a_foreign_record_keeps_its_bytes(record: DeadRecord) -> None:
    """What is no letter is one of its own, known by where it stands, with all its headers."""
    [row] = as_dicts(record)

    assert (row["topic"], row["partition"], row["offset"], row["reason"]) == (TOPIC, 3, record.offset, FOREIGN)
    assert (row["key_bytes"], row["payload"], restore_headers(row["headers"])) == tuple(record[:3])


def test_headers_are_as_readable_as_they_can_be() -> None:
    """Text as text, bytes as base64, null as null, in their order; a name that is no text for PostgreSQL is escaped."""
    headers = [("a", "é".encode()), ("b", b"\xff"), ("a", None), ("n\x00", b"")]

    assert describe_headers(headers) == [
        {"name": "a", "value": "é"},
        {"name": "b", "base64": "/w=="},
        {"name": "a", "value": None},
        {"name": "n\\x00", "name_base64": "bgA=", "value": ""},
    ]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("dl-topic", b"no topic"),
        ("dl-topic", b""),
        ("dl-topic", None),
        ("dl-topic", TOPIC.encode()),
        ("dl-topic", b"x" * 250),
        ("dl-topic", b"\xff"),
        ("dl-topic", b"a:0"),
        ("dl-partition", b"-1"),
        ("dl-partition", b"%d" % 2**31),
        ("dl-offset", b"%d" % 2**63),
        ("dl-offset", b"9" * 10_000),
        ("dl-offset", "٣".encode()),
        ("dl-reason", None),
        ("dl-time", None),
    ],
)
def test_a_letter_without_an_identity_is_foreign(name: str, value: bytes | None) -> None:
    """Also one that says it is the letter of another record of the same topic."""
    letter = make_letter(Record(b"k", b"v"))
    headers = [(other, value if other == name else had) for other, had in letter.headers]

    [row] = as_dicts(letter._replace(headers=headers))

    assert (row["topic"], row["reason"], row["payload"]) == (TOPIC, FOREIGN, b"v")


@pytest.mark.parametrize(
    ("name", "value", "column", "stored"),
    [
        ("dl-attempts", b"many", "attempts", 1),
        ("dl-attempts", b"9" * 5000, "attempts", 2**31 - 1),
        ("dl-time", b"yesterday", "dead_at", datetime.fromtimestamp(1_795_424_400, tz=UTC)),
        ("dl-time", b"2026-11-23T09:00:00", "dead_at", datetime.fromtimestamp(1_795_424_400, tz=UTC)),
        ("dl-time", b"0001-01-01T00:00:00+14:00", "dead_at", datetime(1, 1, 2, tzinfo=UTC)),
        ("dl-time", b"9999-12-31T23:59:59-14:00", "dead_at", datetime(9999, 12, 30, tzinfo=UTC)),
        ("dl-reason", b"a\x00\xffb", "reason", "a\\x00\\xffb"),
        ("dl-error", b"a\x00\xffb", "error", "a\\x00\\xffb"),
    ],
)
def test_facts_that_make_no_sense_are_made_storable(name: str, value: bytes, column: str, stored: Any) -> None:
    """The letter is still known by its original."""
    letter = make_letter(Record(b"k", b"v"))
    headers = [(other, value if other == name else had) for other, had in letter.headers]

    [row] = as_dicts(letter._replace(headers=headers))

    assert (row["topic"], row[column]) == ("t-file-events", stored)


def test_a_letter_that_comes_again_is_the_same_row() -> None:
    """The first stays, with the most attempts of all."""
    [row] = as_dicts(
        make_letter(Record(b"k", b"first"), attempts=2, at=5),
        make_letter(Record(b"k", b"second"), reason="too_large", attempts=4, at=6),
        make_letter(Record(b"k", b"third"), attempts=1, at=9),
    )

    assert (row["payload"], row["reason"], row["attempts"], row["letter_offset"]) == (b"first", "undecodable", 4, 5)


def test_the_last_mark_counts() -> None:
    """Before its letter or after it; a mark alone is a row that the letter can fill later."""
    found = as_dicts(
        make_mark(1, "replayed"),
        make_letter(Record(b"k", b"one"), 1),
        make_letter(Record(b"k", b"two"), 2),
        make_letter(Record(b"k", b"three"), 3),
        make_mark(2, "dropped"),
        make_mark(2, "replayed"),
        make_mark(4, "dropped"),
    )

    assert {row["offset"]: (row["payload"], row["mark"], row["letter_offset"]) for row in found} == {
        1: (b"one", "replayed", 0),
        2: (b"two", "replayed", 0),
        3: (b"three", None, 0),
        4: (None, "dropped", NO_LETTER),
    }


def test_an_original_cannot_pass_for_a_mark() -> None:
    """A producer may send an event with the headers of a mark: its dead letter is a letter all the same."""
    mark = mark_letter(LetterId("t-file-events", 3, 1), "dropped", NOW)

    [row] = as_dicts(make_letter(Record(b"k", b"broken", mark.headers)))

    assert (row["offset"], row["payload"], row["mark"]) == (7, b"broken", None)


@pytest.mark.parametrize(
    "headers",
    [
        (),
        (("dl-mark", b"forgotten"), ("dl-topic", b"t"), ("dl-partition", b"0"), ("dl-offset", b"0"), ("dl-time", b"")),
        (("dl-mark", b"dropped"), ("dl-topic", b"t"), ("dl-partition", b"x"), ("dl-offset", b"0"), ("dl-time", b"")),
        (("dl-mark", None), ("dl-topic", b"t"), ("dl-partition", b"0"), ("dl-offset", b"0"), ("dl-time", b"")),
        (("dl-mark", b"dropped"), ("dl-topic", b"t"), ("dl-partition", b"0"), ("dl-offset", b"0")),
    ],
)
def test_what_is_no_mark(headers: Any) -> None:
    """A status that is none, a letter that is none, headers that are missing."""
    assert (read_mark(headers), read_letter(headers)) == (None, None)


@given(HEADERS)
def test_an_event_that_is_sent_in_again_names_its_letter_once(headers: Any) -> None:
    """Key, value and headers are the original's, but for those of dead letters."""
    record = replayed(Record(b"k", b"v", headers), LetterId("t-file-events", 3, 7))

    assert (record.key, record.value, record.headers[-1]) == (b"k", b"v", ("dl-replay-of", b"t-file-events:3:7"))
    assert list(record.headers[:-1]) == [header for header in headers if not header[0].startswith("dl-")]


@given(st.from_regex(r"[A-Za-z0-9._-]{1,249}", fullmatch=True), st.integers(0, 2**31 - 1), st.integers(0, 2**63 - 1))
def test_an_identity_reads_back(topic: str, partition: int, offset: int) -> None:
    """What is written is what is read."""
    letter = LetterId(topic, partition, offset)

    assert parse_letter_id(str(letter)) == letter


def test_the_time_of_a_batch_is_that_of_its_newest_record() -> None:
    """It is the watermark's event time."""
    records = [DeadRecord(None, None, [], timestamp=0), DeadRecord(None, None, [], timestamp=1000)]

    assert event_time(records) == datetime.fromtimestamp(0, tz=UTC) + timedelta(seconds=1)
