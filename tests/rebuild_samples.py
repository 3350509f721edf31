"""A changelog that is written by hand, whole or as compaction leaves it, and the live projections of it."""

from __future__ import annotations

import random
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from typing import Any, Final

import asyncpg
from aiokafka import AIOKafkaProducer

from pipeline.events import PROGRESS_KEY, Progress, Stamp, encode_record
from pipeline.logreader import LogReader
from pipeline.postgres import PostgresConnectionManager
from pipeline.settings import Settings
from pipeline.topics import FILES_CHANGELOG, topic_name
from projections.feed import decode_feed
from projections.writer import ProjectionWriter
from tables.files import Rules, fold
from tests.projection_samples import NOON, Record

PARTITIONS: Final = 4
_RULES: Final = Rules(attempts_max=3, dedup_ids_max=3, dedup_window_ms=8000)

#: Everything that the tables behind the views hold, in order.
TABLES: Final = {
    "files": "SELECT * FROM stampline.files ORDER BY uri_key",
    "file_history": "SELECT * FROM stampline.file_history ORDER BY input_partition, input_offset",
    "contents": "SELECT * FROM stampline.contents ORDER BY digest",
    "activity": "SELECT * FROM stampline.activity ORDER BY minute, namespace, op, input_partition",
}
WATERMARKS: Final = """
SELECT projection, partition, feed_offset, input_offset FROM stampline.watermarks ORDER BY projection, partition
"""


def make_changelog(partition: int, inputs: int, *, uris: int = 40) -> list[Record]:
    """Run random inputs through the reducer and return what it writes, every kind of outcome among it."""
    draw = random.Random(partition)
    stamps: list[Stamp] = []
    offset = -1
    for _ in range(inputs):
        offset += draw.randint(1, 2)
        op = draw.choice(["created", "modified", "modified", "deleted", "moved"])
        rejected = draw.random() < 0.05
        content = None if rejected or op in {"deleted", "moved"} else draw.randrange(60)
        stamps.append(
            Stamp(
                input_offset=offset,
                previous_offset=stamps[-1].input_offset if stamps else None,
                uri=f"file:///{partition}/{draw.randrange(uris)}" if not rejected or draw.random() < 0.5 else None,
                event_id=draw.choice([f"event-{offset}"] * 5 + ["again"]),
                op=op,
                namespace=draw.choice(["n", "m"]),
                occurred_at=NOON,
                recorded_at=NOON + timedelta(seconds=offset),
                stamped_at=NOON + timedelta(seconds=offset, milliseconds=3),
                digest=None if content is None else bytes([content]) * 32,
                size=None if content is None else content * 100,
                reason="content_unavailable" if rejected else None,
                expected_version=draw.choice([None, None, None, 0, 1, 9]),
                metadata=draw.choice([None, b'{"k": 1}']),
                attempt=draw.choice([0, 3]),
            )
        )
    changelog: list[Record] = []
    store: dict[bytes, bytes] = {}
    progress: Progress | None = None
    for begin in range(0, inputs, 50):
        folded = fold(stamps[begin : begin + 50], store.get, progress, _RULES)
        progress = folded.progress
        store.update(folded.changes)
        for key, value in [*folded.changes, (PROGRESS_KEY, encode_record(progress))]:
            changelog.append(Record(key, value, len(changelog)))
    return changelog


def compact(changelog: Sequence[Record], *, tail: int) -> list[Record]:
    """Return what compaction leaves: before the last `tail` records, only the newest of each key. Offsets close up."""
    newest = {record.key: record.offset for record in changelog}
    border = len(changelog) - tail
    kept = [record for record in changelog if record.offset >= border or newest[record.key] == record.offset]
    return [Record(record.key, record.value, offset) for offset, record in enumerate(kept)]


class Site:
    """One deployment whose reducer and projector are played by the test."""

    def __init__(self, settings: Settings, manager: PostgresConnectionManager) -> None:
        self.settings = settings
        self.manager = manager
        self.topic = topic_name(settings, FILES_CHANGELOG)
        self.now = datetime.now(UTC)
        self.writer = ProjectionWriter(manager, "live", now=lambda: self.now)

    async def produce(self, partition: int, records: Sequence[Record]) -> None:
        """Append records to the feed."""
        producer = AIOKafkaProducer(bootstrap_servers=self.settings.kafka_bootstrap_servers, linger_ms=5)
        await producer.start()
        try:
            for record in records:
                await producer.send(self.topic, key=record.key, value=record.value, partition=partition)
            await producer.flush()
        finally:
            await producer.stop()

    async def project(self, *, records_max: int = 700) -> None:
        """Project what the feed has, from where the live projections stand."""
        for partition in range(PARTITIONS):
            position = await self.writer.open_partition(partition)
            async with LogReader(self.settings, self.topic, partition) as reader:
                async for records in reader.read(position, records_max=records_max):
                    await self.writer.write(partition, position, decode_feed(records), reader.position)
                    position = reader.position

    async def fill(self, inputs: int = 600, *, uris: int = 40) -> None:
        """Make a feed in each partition and project it."""
        for partition in range(PARTITIONS):
            await self.produce(partition, make_changelog(partition, inputs, uris=uris))
        await self.project()

    async def fill_compacted(self, inputs: int = 600, *, tail: int = 100) -> int:
        """Project a whole feed in each partition, of which Kafka has only what compaction leaves.

        Returns:
            How many changes that has taken.
        """
        taken = 0
        for partition in range(PARTITIONS):
            whole = make_changelog(partition, inputs)
            kept = compact(whole, tail=tail)
            await self.produce(partition, kept)
            assert await self.writer.open_partition(partition) == 0
            await self.writer.write(partition, 0, decode_feed(whole), len(kept))
            taken += len(decode_feed(whole).keys) - len(decode_feed(kept).keys)
        return taken

    async def fetch(self, statement: str, *arguments: Any) -> list[tuple[Any, ...]]:
        """Ask the database, on a connection of its own."""
        connection = await asyncpg.connect(self.settings.postgres_url)
        try:
            return [tuple(row) for row in await connection.fetch(statement, *arguments)]
        finally:
            await connection.close()

    async def tables(self) -> dict[str, list[tuple[Any, ...]]]:
        """Return everything that is live, and the watermarks."""
        return {name: await self.fetch(sql) for name, sql in {**TABLES, "watermarks": WATERMARKS}.items()}
