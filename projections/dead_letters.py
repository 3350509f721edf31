"""Projection `dead_letters`: what is in the topic of dead letters, one row for each, and what became of it.

Every record of the topic can be stored, whoever wrote it. What is shown to people is text in which nothing is lost but
what PostgreSQL has no place for, escaped; beside it stands what came, so that the original can be made again exactly.
A record that is neither a dead letter nor a mark is shown as one of its own, with reason `foreign`.

A mark may come before its letter, or without it: a letter of another partition, or one that retention has taken. It is
remembered by a row with `NO_LETTER`, which the letter fills when it comes.

Pure: imports neither faust, asyncio, asyncpg nor os.
"""

from __future__ import annotations

from base64 import b64decode, b64encode
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any, Final, NamedTuple, Protocol

import orjson

from pipeline.records import Headers, Letter, LetterId, Mark, MarkStatus, read_letter, read_mark

#: The name of this projection in the watermarks.
NAME: Final = "dead_letters"

#: The columns of the tuples that `rows` returns, in their order; `mark` is null where the letter has none.
COLUMNS: Final = (
    "topic",
    "partition",
    "offset",
    "dead_at",
    "letter_offset",
    "attempts",
    "reason",
    "error",
    "key",
    "key_bytes",
    "payload",
    "headers",
    "mark",
)

#: The reason of a record that somebody else has written into the topic.
FOREIGN: Final = "foreign"

#: The `letter_offset` of a row that only a mark has told of.
NO_LETTER: Final = -1

_INT32_MAX: Final = 2**31 - 1
# PostgreSQL and Python agree on the years between in every time zone.
_EARLIEST: Final = datetime(1, 1, 2, tzinfo=UTC)
_LATEST: Final = datetime(9999, 12, 30, tzinfo=UTC)


class DeadRecord(Protocol):
    """What is needed of a record of the topic; aiokafka's records fit."""

    @property
    def topic(self) -> str:
        """The topic of dead letters, with its prefix."""

    @property
    def partition(self) -> int:
        """Its partition."""

    @property
    def offset(self) -> int:
        """Where the record itself stands."""

    @property
    def timestamp(self) -> int:
        """When Kafka got it, in ms."""

    @property
    def key(self) -> bytes | None:
        """The key of the original."""

    @property
    def value(self) -> bytes | None:
        """The value of the original."""

    @property
    def headers(self) -> Headers:
        """The headers of the original, and those of the letter."""


class _Row(NamedTuple):
    dead_at: datetime
    letter_offset: int
    attempts: int
    reason: str
    error: str
    key: str | None
    key_bytes: bytes | None
    payload: bytes | None
    headers: str


def rows(records: Iterable[DeadRecord]) -> list[tuple[Any, ...]]:
    """Return one row for each letter that `records`, in order, tell of.

    Of a letter that comes again the first stays, with the most attempts; of several marks the last one counts.
    """
    letters: dict[LetterId, _Row] = {}
    marked: dict[LetterId, _Row] = {}
    marks: dict[LetterId, MarkStatus] = {}
    for record in records:
        mark = read_mark(record.headers)
        if mark is not None:
            marks[mark.id] = mark.status
            marked.setdefault(mark.id, _marked_row(record, mark))
            continue
        letter = read_letter(record.headers)
        if letter is None or letter.id.topic == record.topic:
            identity, row = LetterId(record.topic, record.partition, record.offset), _foreign_row(record)
        else:
            identity, row = letter.id, _letter_row(record, letter)
        known = letters.get(identity)
        letters[identity] = row if known is None else known._replace(attempts=max(known.attempts, row.attempts))
    return [(*identity, *row, marks.get(identity)) for identity, row in (marked | letters).items()]


def event_time(records: Sequence[DeadRecord]) -> datetime:
    """Return when Kafka got the newest of `records`."""
    return _as_time(records[-1].timestamp)


def describe_headers(headers: Headers) -> list[dict[str, str | None]]:
    """Return headers as JSON has them, in order: text as `value`, what is no text as `base64`."""
    return [_described(name, value) for name, value in headers]


def restore_headers(stored: str) -> list[tuple[str, bytes | None]]:
    """Return the headers that column `headers` holds, exactly as they came."""
    return [_restored(entry) for entry in orjson.loads(stored)]


def _letter_row(record: DeadRecord, letter: Letter) -> _Row:
    return _Row(
        dead_at=_parse_time(letter.facts["dl-time"]) or _as_time(record.timestamp),
        letter_offset=record.offset,
        attempts=_parse_attempts(letter.facts["dl-attempts"]),
        reason=_readable(letter.facts["dl-reason"]),
        error=_readable(letter.facts["dl-error"]),
        key=None if record.key is None else _readable(record.key),
        key_bytes=record.key,
        payload=record.value,
        headers=_store_headers(letter.headers),
    )


def _foreign_row(record: DeadRecord) -> _Row:
    return _Row(
        dead_at=_as_time(record.timestamp),
        letter_offset=record.offset,
        attempts=0,
        reason=FOREIGN,
        error="not a dead letter of stampline: somebody else has written it into the topic",
        key=None if record.key is None else _readable(record.key),
        key_bytes=record.key,
        payload=record.value,
        headers=_store_headers(record.headers),
    )


def _marked_row(record: DeadRecord, mark: Mark) -> _Row:
    return _Row(
        dead_at=_as_time(record.timestamp),
        letter_offset=NO_LETTER,
        attempts=0,
        reason="unknown",
        error=f"{mark.status}, but the letter itself is not there: the topic does not hold it any more",
        key=None,
        key_bytes=None,
        payload=None,
        headers="[]",
    )


def _store_headers(headers: Headers) -> str:
    return orjson.dumps(describe_headers(headers)).decode()


def _described(name: str, value: bytes | None) -> dict[str, str | None]:
    raw_name = name.encode(errors="surrogatepass")
    entry: dict[str, str | None] = {"name": _readable(raw_name)}
    if entry["name"] != name:
        entry["name_base64"] = b64encode(raw_name).decode()
    if value is None:
        return entry | {"value": None}
    text = _readable(value)
    return entry | ({"value": text} if text.encode() == value else {"base64": b64encode(value).decode()})


def _restored(entry: Mapping[str, str | None]) -> tuple[str, bytes | None]:
    name, raw_name = entry["name"], entry.get("name_base64")
    if raw_name is not None:
        name = b64decode(raw_name).decode(errors="surrogatepass")
    assert name is not None
    raw, text = entry.get("base64"), entry.get("value")
    if raw is not None:
        return name, b64decode(raw)
    return name, None if text is None else text.encode()


def _readable(value: bytes) -> str:
    """Return text that PostgreSQL takes: what is not UTF-8, and NUL, is escaped."""
    return value.decode(errors="backslashreplace").replace("\0", "\\x00")


def _parse_attempts(value: bytes) -> int:
    # Python refuses to read a number of thousands of digits.
    return min(int(value[:10]), _INT32_MAX) if value.isdigit() else 1


def _parse_time(value: bytes) -> datetime | None:
    try:
        moment = datetime.fromisoformat(value.decode("ascii", errors="replace"))
    except ValueError:
        return None
    return None if moment.tzinfo is None else min(max(moment, _EARLIEST), _LATEST)


def _as_time(timestamp_ms: int) -> datetime:
    """A producer's clock may lie, but not past what a timestamp can hold."""
    return datetime.fromtimestamp(min(max(timestamp_ms, 0), 253_370_764_800_000) / 1000, tz=UTC)
