"""The retry role: when each record of a batch is sent in again, what is no event, and what a revoke cuts off."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any, cast

import pytest
from aiokafka.structs import ConsumerRecord
from faust.types import TP
from hypothesis import given
from hypothesis import strategies as st
from structlog.testing import capture_logs

from agents import retry as retry_module
from agents.retry import DUE_HEADER, Portion, Retry, plan, sift
from pipeline.events import ATTEMPT_HEADER, FileEvent, encode_event
from pipeline.lanes import Batch
from pipeline.metrics import Metrics
from pipeline.records import Record
from pipeline.transactions import Writer
from pipeline.transport import BatchConsumer, LogRange, Reach
from tests.fix_services import make_settings_for

pytestmark = pytest.mark.unit

NOON = datetime(2026, 11, 23, 12, tzinfo=UTC)
NOW_MS = int(NOON.timestamp() * 1000)
CAP_MS = 250
TOPIC = TP("file-events-retry", 3)
EVENT = FileEvent(event_id="e", uri="file:///a", op="modified", occurred_at=NOON, content=b"a", expected_version=7)


def make_record(
    offset: int, *headers: tuple[str, bytes | None], key: bytes | None = b"file:///a", value: bytes | None = None
) -> Any:
    """Make a record as aiokafka consumes it; its value is a good event if none is given."""
    value = encode_event(EVENT) if value is None else value
    return ConsumerRecord(*TOPIC, offset, NOW_MS, 0, key, value, None, 0, 0, headers)


def due(offset: int, ms: float) -> Any:
    """Make a record that is due so many ms after noon."""
    return make_record(offset, (DUE_HEADER, b"%d" % (NOW_MS + ms)))


def cut(*pauses_ms: float) -> list[tuple[float, list[int]]]:
    """Plan records that are due so many ms after noon, and return when each portion goes, with its offsets."""
    portions = plan([due(offset, ms) for offset, ms in enumerate(pauses_ms)], now_ms=NOW_MS, cap_ms=CAP_MS)
    return [(pause_ms, [record.offset for record in records]) for pause_ms, records in portions]


def test_what_is_due_goes_at_once() -> None:
    """It does not wait for the rest of the batch."""
    assert cut(-5, 0, 100) == [(0, [0, 1]), (100, [2])]


def test_what_is_due_soon_after_another_goes_with_it() -> None:
    """Within a quarter of the longest pause; none goes before it is due."""
    assert cut(10, 50, 72, 73) == [(72, [0, 1, 2]), (73, [3])]


def test_a_record_waits_for_those_before_it() -> None:
    """Also where it is due itself: events of one file stay in order."""
    assert cut(100, 0, -1000) == [(100, [0, 1, 2])]


def test_a_broken_clock_stalls_nothing() -> None:
    """Due in a year is due after the longest pause, and so are the records after it: once, not each for itself."""
    year_ms = 365 * 24 * 3600 * 1000

    assert cut(year_ms, year_ms, 0) == [(CAP_MS, [0, 1, 2])]


@pytest.mark.parametrize(
    "headers",
    [
        (),
        ((DUE_HEADER, b""),),
        ((DUE_HEADER, None),),
        ((DUE_HEADER, b"soon"),),
        ((DUE_HEADER, b"-5"),),
        ((DUE_HEADER, "٣".encode()),),
        ((ATTEMPT_HEADER, b"1"),),
    ],
)
def test_what_does_not_say_when_is_due_now(headers: tuple[tuple[str, bytes | None], ...]) -> None:
    """A missing or malformed header is no reason to wait, nor to fail."""
    record = make_record(0, *headers)

    assert plan([record], now_ms=NOW_MS, cap_ms=CAP_MS) == [Portion(0.0, [record])]


def test_a_number_of_thousands_of_digits_is_far_away() -> None:
    """Python refuses to read one; it is not read whole."""
    record = make_record(0, (DUE_HEADER, b"9" * 10_000))

    assert plan([record], now_ms=NOW_MS, cap_ms=CAP_MS) == [Portion(CAP_MS, [record])]


@given(pauses_ms=st.lists(st.integers(-1000, 2000), min_size=1, max_size=60), cap_ms=st.integers(1, 1000))
def test_laws_of_a_plan(pauses_ms: list[int], cap_ms: int) -> None:
    """Every record once, in order; none early, none later than the cap; at most five transactions."""
    records = [due(offset, ms) for offset, ms in enumerate(pauses_ms)]
    portions = plan(records, now_ms=NOW_MS, cap_ms=cap_ms)
    times = [portion.pause_ms for portion in portions]

    assert [record for portion in portions for record in portion.records] == records
    assert times == sorted(set(times))
    assert times[0] >= 0
    assert times[-1] <= cap_ms
    assert len(portions) <= 5
    for pause_ms, taken in portions:
        assert all(pause_ms >= min(pauses_ms[record.offset], cap_ms) for record in taken)


def test_an_event_goes_as_it_came() -> None:
    """Key, value and headers are kept to the byte, the attempt among them; only when it was due is left out."""
    original = b' {"op":"deleted", "uri":"file:///a","event_id":"e","occurred_at":"2026-11-23T12:00:00Z","x":1} '
    record = make_record(
        7, ("trace", b"\xff"), (ATTEMPT_HEADER, b"2"), (DUE_HEADER, b"1"), ("none", None), value=original
    )

    events, letters = sift([record], now=NOON)

    assert events == [Record(b"file:///a", original, (("trace", b"\xff"), (ATTEMPT_HEADER, b"2"), ("none", None)))]
    assert letters == []


@pytest.mark.parametrize(
    ("key", "value", "error"),
    [
        (b"file:///a", b"", b"undecodable"),
        (b"file:///a", b"\xff\x00", b"undecodable"),
        (b"file:///a", b'{"op": "created"}', b"invalid_event"),
        (b"file:///b", encode_event(EVENT), b"wrong_key"),
        (None, encode_event(EVENT), b"wrong_key"),
    ],
)
def test_what_is_no_event_becomes_a_dead_letter(key: bytes | None, value: bytes, error: bytes) -> None:
    """With its own bytes, where it stood, and why."""
    events, [letter] = sift([make_record(7, (DUE_HEADER, b"1"), key=key, value=value)], now=NOON)
    told = dict(letter.headers)

    assert events == []
    assert (letter.key, letter.value) == (key, value)
    assert (told["dl-reason"], told["dl-topic"], told["dl-partition"], told["dl-offset"]) == (
        b"invalid_retry",
        b"file-events-retry",
        b"3",
        b"7",
    )
    assert (told["dl-error"] or b"").startswith(error)


def test_a_record_without_a_value_becomes_a_dead_letter() -> None:
    """A tombstone is nothing to send in."""
    record = ConsumerRecord(*TOPIC, 7, NOW_MS, 0, b"file:///a", None, None, 0, 0, ())
    events, [letter] = sift([record], now=NOON)

    assert events == []
    assert letter.value is None


class FakeWriter:
    """Keeps what is written."""

    def __init__(self) -> None:
        self.written: list[tuple[dict[str, list[Record]], dict[TP, int]]] = []
        self.wrote = asyncio.Event()

    async def write(self, outputs: Mapping[str, Sequence[Record]], offsets: Mapping[TP, int]) -> dict[str, int]:
        """Keep it."""
        self.written.append(({topic: list(records) for topic, records in outputs.items()}, dict(offsets)))
        self.wrote.set()
        return {}

    async def open(self) -> None:
        """Be open."""

    async def aclose(self) -> None:
        """Be closed."""


class FakeConsumer:
    """Has nothing committed, and has fetched as far as it is told."""

    def __init__(self) -> None:
        self.reach: dict[TP, Reach] = {}

    async def log_range(self, tp: TP) -> LogRange:
        """Return an empty log."""
        return LogRange(0, 0, None)

    async def reaches(self, tps: Sequence[TP]) -> dict[TP, Reach]:
        """Return how far it is."""
        return self.reach

    async def commit_offsets(self, offsets: Mapping[TP, int]) -> None:
        """Commit nothing."""


Running = tuple[Retry, FakeWriter, FakeConsumer, Metrics]


@pytest.fixture
async def running(monkeypatch: pytest.MonkeyPatch) -> Running:
    """A retry role with partition 3 open; its longest pause is an hour."""
    writer, consumer, metrics = FakeWriter(), FakeConsumer(), Metrics()
    monkeypatch.setattr(retry_module, "Writer", lambda *_args, **_options: cast("Writer", writer))
    retry = Retry(make_settings_for(retry_backoff_cap_ms=3_600_000), transactions=True, metrics=metrics)
    assert await retry.open(TOPIC, cast("BatchConsumer", consumer)) == 0
    return retry, writer, consumer, metrics


async def test_a_portion_is_committed_while_the_next_one_waits(running: Running) -> None:
    """Each with the offset after its own records; a cancelled wait writes nothing, and ends at once."""
    retry, writer, _, _ = running
    soon = make_record(11, (DUE_HEADER, b"9" * 15))
    process = asyncio.ensure_future(retry.process(Batch(TOPIC, [make_record(9), soon])))
    await writer.wrote.wait()
    process.cancel()
    with pytest.raises(asyncio.CancelledError):
        await process

    [(outputs, offsets)] = writer.written
    assert {topic: len(records) for topic, records in outputs.items()} == {"file-events": 1, "file-events-dlq": 0}
    assert offsets == {TOPIC: 10}


@pytest.mark.parametrize(
    ("reach", "committed"),
    [
        (Reach(12, 10, 12, 0.0), 12),
        (Reach(12, 11, 12, 0.0), 10),
        (Reach(12, None, 12, 0.0), 10),
        (None, 10),
    ],
    ids=["only markers follow", "records follow", "nothing was taken", "not known"],
)
async def test_markers_are_passed_with_the_last_record(running: Running, reach: Reach | None, committed: int) -> None:
    """What is committed lies after the markers that follow, but never after a record that was not sent."""
    retry, writer, consumer, _ = running
    consumer.reach = {TOPIC: reach} if reach is not None else {}
    await retry.process(Batch(TOPIC, [make_record(9)]))

    assert [offsets for _, offsets in writer.written] == [{TOPIC: committed}]


async def test_a_portion_is_logged_and_counted(running: Running) -> None:
    """After it has been committed, with its dead letters."""
    retry, _, _, metrics = running
    with capture_logs() as lines:
        await retry.process(Batch(TOPIC, [make_record(9), make_record(10, value=b"{")]))
    counted = {
        (sample.name, tuple(sample.labels.values())): sample.value
        for family in metrics.collect()
        for sample in family.samples
    }

    assert [(line["event"], line["role"], line["count"], line["dead_letters"]) for line in lines] == [
        ("batch_committed", "retry", 2, 1)
    ]
    assert counted["dead_letters_total", ("invalid_retry",)] == 1
    assert counted["batch_size_records_count", ()] == 1
    assert counted["batch_duration_seconds_count", ("retry",)] == 1
