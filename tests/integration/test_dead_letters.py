"""Dead letters in PostgreSQL: every one of them, once, with its bytes and with what became of it."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any, NamedTuple

import pytest
from aiokafka import AIOKafkaProducer

from pipeline.errors import PartitionFenced, RowsRefused
from pipeline.kafka import partition_for
from pipeline.postgres import PostgresConnectionManager
from pipeline.records import LetterId, MarkStatus, Record, dead_letter_of_event, mark_letter
from pipeline.scan import file_uri
from pipeline.settings import Settings
from pipeline.verify import all_faults, verify
from projections.dead_letters import restore_headers
from projections.letters_writer import LettersWriter
from tests.fix_road import Road, make_events

pytestmark = pytest.mark.integration

ROLES = ("hasher", "reducer", "projector")
NOW = datetime(2026, 11, 23, 9, tzinfo=UTC)
ALL = 'SELECT * FROM stampline.dead_letters ORDER BY topic, "partition", "offset"'
STATUSES = 'SELECT "offset", status, payload, attempts FROM dead_letters ORDER BY "offset"'


class DeadRecord(NamedTuple):
    """A record of the topic as aiokafka brings it."""

    key: bytes | None
    value: bytes | None
    headers: Sequence[tuple[str, bytes | None]]
    offset: int
    partition: int = 3
    timestamp: int = 1_795_424_400_000
    topic: str = "file-events-dlq"


def make_letter(original: Record, offset: int, *, at: int, attempts: int = 1) -> DeadRecord:
    """Make the dead letter, standing at offset `at`, of the event at this offset of partition 3."""
    letter = dead_letter_of_event(
        original,
        topic="file-events",
        partition=3,
        offset=offset,
        reason="undecodable",
        error="no JSON",
        attempts=attempts,
        now=NOW,
    )
    return DeadRecord(*letter, offset=at)


def make_mark(offset: int, status: MarkStatus, *, at: int) -> DeadRecord:
    """Make the mark, standing at offset `at`, of the letter of an event at this offset of partition 3."""
    return DeadRecord(*mark_letter(LetterId("file-events", 3, offset), status, NOW), offset=at)


def make_hostile(count: int) -> list[DeadRecord]:
    """Make records with every kind of bytes in every place, letters of events and others."""
    chance = random.Random(53)
    pieces = [b"", b"\x00", b"\xff\xfe", b"text", "é\u202e\U0010ffff".encode(), b"\\u0000", b'"', b"\x1b[31m", None]
    names = ["", "a", "a\x00", "dl-topic", "dl-reason", "\ud800", "é", "x" * 300]

    def piece() -> bytes | None:
        return chance.choice([*pieces, chance.randbytes(chance.randrange(64))])

    records = []
    for place in range(count):
        headers = [(chance.choice(names), piece()) for _ in range(chance.randrange(5))]
        original = Record(piece(), piece(), headers)
        letter = make_letter(original, place, at=place)
        spoiled = [(name, chance.choice([value, piece()])) for name, value in letter.headers]
        kinds = [letter, letter._replace(headers=spoiled), DeadRecord(*original, offset=place)]
        records.append(chance.choice(kinds)._replace(timestamp=chance.choice([-(2**63), 0, 1, 2**63 - 1])))
    return records


async def test_postgres_takes_every_record(settings: Settings, road: Road) -> None:
    """Whatever bytes are in it: each record is a row, from which the original can be made again."""
    records = make_hostile(600)
    async with PostgresConnectionManager(road.settings) as manager:
        writer = LettersWriter(manager, "one")
        assert await writer.open_partition(3) == 0
        await writer.write(3, 0, records, 600)
        assert await writer.open_partition(3) == 600

    rows = {row["letter_offset"]: row for row in await road.fetch(ALL)}
    assert sorted(rows) == list(range(600))
    for record in records:
        row = rows[record.offset]
        headers = restore_headers(row["headers"])
        assert (row["key_bytes"], row["payload"]) == (record.key, record.value)
        assert headers == list(record.headers if row["reason"] == "foreign" else record.headers[:-7])


async def test_a_letter_is_one_row_whatever_comes_when(road: Road) -> None:
    """A repeat changes nothing but the attempts; marks count before their letter too, in any number of batches."""
    batches = [
        [make_letter(Record(b"a", b"first"), 1, at=0), make_mark(2, "dropped", at=1)],
        [make_letter(Record(b"a", b"again"), 1, at=2, attempts=3), make_letter(Record(b"b", b"late"), 2, at=3)],
        [make_mark(1, "replayed", at=4), make_letter(Record(b"c", b"open"), 4, at=5)],
        [make_letter(Record(b"a", b"again"), 1, at=6), make_letter(Record(b"b", b"again"), 2, at=7)],
    ]
    async with PostgresConnectionManager(road.settings) as manager:
        writer = LettersWriter(manager, "one")
        position = await writer.open_partition(3)
        for batch in batches:
            await writer.write(3, position, batch, batch[-1].offset + 1)
            position = batch[-1].offset + 1

    assert [tuple(row) for row in await road.fetch(STATUSES)] == [
        (1, "replayed", b"first", 3),
        (2, "dropped", b"late", 1),
        (4, "open", b"open", 1),
    ]
    [mark] = await road.fetch("SELECT * FROM projection_watermarks WHERE projection = 'dead_letters'")
    assert (mark["partition"], mark["feed_offset"], mark["input_offset"], mark["owner"]) == (3, 8, None, "one")
    assert mark["event_time"] == datetime.fromtimestamp(1_795_424_400, tz=UTC)


async def test_a_zombie_writes_no_letter(road: Road) -> None:
    """The watermark moves by compare-and-set, in the transaction of the rows."""
    records = [make_letter(Record(b"a", b"one"), 1, at=0)]
    async with PostgresConnectionManager(road.settings) as manager:
        zombie, owner = LettersWriter(manager, "zombie"), LettersWriter(manager, "owner")
        await zombie.open_partition(3)
        await owner.open_partition(3)
        await owner.write(3, 0, records, 1)
        with pytest.raises(PartitionFenced, match="the dead letters of partition 3"):
            await zombie.write(3, 0, [make_letter(Record(b"a", b"two"), 2, at=0)], 1)

    assert [row["payload"] for row in await road.fetch(STATUSES)] == [b"one"]


async def test_a_table_that_was_changed_stops_the_partition(road: Road) -> None:
    """Nothing is left out: the error names the table, and when that is mended the same batch is written."""
    records = [make_letter(Record(b"a", b"one"), 1, at=0)]
    await road.fetch("ALTER TABLE stampline.dead_letters ADD CONSTRAINT nothing_goes CHECK (false)")
    async with PostgresConnectionManager(road.settings) as manager:
        writer = LettersWriter(manager, "one")
        await writer.open_partition(3)
        with pytest.raises(RowsRefused, match=r"nothing_goes.*mend table stampline\.dead_letters"):
            await writer.write(3, 0, records, 1)
        await road.fetch("ALTER TABLE stampline.dead_letters DROP CONSTRAINT nothing_goes")
        await writer.write(3, 0, records, 1)

    assert len(await road.fetch(STATUSES)) == 1


def make_event(uri: str, **fields: object) -> bytes:
    """Make a file event as a producer would."""
    told = {"event_id": f"id of {uri}", "uri": uri, "op": "created", "occurred_at": "2026-11-23T09:00:00Z"}
    return json.dumps(told | fields).encode()


async def send(road: Road, topic: str, *records: Record) -> None:
    """Send records, each to the partition of its key."""
    producer = AIOKafkaProducer(
        bootstrap_servers=road.settings.kafka_bootstrap_servers, max_request_size=8 * 2**20, max_batch_size=2**20
    )
    await producer.start()
    try:
        for key, value, headers in records:
            await producer.send_and_wait(
                road.settings.kafka_topic_prefix + topic,
                key=key,
                value=value,
                headers=list(headers),
                partition=partition_for(key or b"", 4),
            )
    finally:
        await producer.stop()


async def until_letters(road: Road, count: int) -> None:
    """Wait until so many dead letters are to be seen."""

    async def seen() -> bool:
        return len(await road.fetch(STATUSES)) >= count

    await road.until(seen)


async def test_every_kind_of_letter_is_in_the_view(road: Road, tmp_path: Any) -> None:
    """With its reason and the bytes of the original; made again from the topic, the rows are the same."""
    gone = file_uri(str(tmp_path / "gone"))
    retried = [("stampline-attempt", b"5"), ("who", b"me")]
    bad = {
        "undecodable": Record(b"file:///a", b"\xff\x00 no JSON", [("h", b"\xff"), ("n", None), ("dl-topic", b"mine")]),
        "content_missing": Record(gone.encode(), make_event(gone)),
        "too_large": Record(b"file:///big", make_event("file:///big", content="A" * 2 * 2**20)),
        "wrong_key": Record(b"another\xff", make_event("file:///k", content="")),
        "gave_up": Record(b"file:///w", make_event("file:///w", content="", expected_version=9), retried),
    }
    road.start("hasher", "reducer")
    projector = road.start("projector")
    await send(road, "file-events", *bad.values())
    foreign = Record(b"what", b"is this?", [("dl-reason", b"none")])
    await send(road, "file-events-dlq", foreign)
    positions = await road.send(make_events(100, 20, seed=54))
    await road.until_visible(positions)
    await until_letters(road, len(bad) + 1)
    rows = await road.fetch(ALL)
    shown = {row["reason"]: row for row in await road.fetch("SELECT * FROM dead_letters")}

    assert {row["reason"]: (row["key_bytes"], row["payload"]) for row in rows} == {
        **{reason: (record.key, record.value) for reason, record in bad.items()},
        "foreign": (foreign.key, foreign.value),
    }
    assert {row["topic"] for row in rows} == {
        road.settings.kafka_topic_prefix + name for name in ("file-events", "file-events-dlq")
    }
    assert (shown["wrong_key"]["key"], shown["undecodable"]["status"], shown["gave_up"]["attempts"]) == (
        "another\\xff",
        "open",
        6,
    )
    assert json.loads(shown["undecodable"]["headers"]) == [
        {"name": "h", "base64": "/w=="},
        {"name": "n", "value": None},
        {"name": "dl-topic", "value": "mine"},
    ]
    await road.until(lambda: lag_is_live(road))
    assert all_faults(await verify(road.settings)) == []

    assert projector.terminate() == 0
    await road.fetch("TRUNCATE stampline.dead_letters")
    await road.fetch("DELETE FROM stampline.watermarks WHERE projection = 'dead_letters'")
    road.start("projector")
    await until_letters(road, len(bad) + 1)
    assert await road.fetch(ALL) == rows


async def lag_is_live(road: Road) -> bool:
    """Tell whether all dead letters are known to be visible, in each partition."""
    rows = await road.fetch("SELECT * FROM projection_lag WHERE projection = 'dead_letters'")
    return [(row["rows_behind"], row["lag_ms"], row["status"]) for row in rows] == [(0, 0, "live")] * 4
