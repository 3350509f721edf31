"""The limit: the chain's work as an expert would write it by hand, in one process on librdkafka and COPY.

Reads file events, hashes their contents, keeps each file's state in a dict, produces a changelog and upserts the state
in PostgreSQL. At least once: offsets are committed after the rows and the changelog of their batch are durable. What it
leaves out is what it is the limit of: recovery, history, deduplication, more than one process, rejected input.

Decoding a batch overlaps with writing the one before it, in a thread of its own.
"""

from __future__ import annotations

import asyncio
import base64
import json
import os
import signal
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Final

import asyncpg
import orjson
from blake3 import blake3
from confluent_kafka import Consumer, KafkaException, Producer, TopicPartition
from confluent_kafka.admin import AdminClient, NewTopic  # type: ignore[attr-defined]

# Measured on two cores: half as many are a seventh slower (more rows for the same files), twice as many no faster.
BATCH_EVENTS: Final = 20_000

Row = tuple[str, int, bytes, int]

TABLE: Final = """
CREATE TABLE files (
    uri text PRIMARY KEY,
    version bigint NOT NULL,
    digest bytea NOT NULL,
    size bigint NOT NULL,
    updated_at timestamptz NOT NULL
) WITH (fillfactor = 80)
"""
STAGE: Final = (
    "CREATE TEMPORARY TABLE staged (uri text, version bigint, digest bytea, size bigint) ON COMMIT DELETE ROWS"
)
UPSERT: Final = """
INSERT INTO files SELECT uri, version, digest, size, clock_timestamp() FROM staged
ON CONFLICT (uri) DO UPDATE
SET version = excluded.version, digest = excluded.digest, size = excluded.size, updated_at = excluded.updated_at
"""


class Sink:
    """PostgreSQL and the commit of offsets; lives in one thread."""

    def __init__(self, dsn: str, topic: str, consumer: Consumer, producer: Producer, failures: list[str]) -> None:
        self._topic = topic
        self._consumer = consumer
        self._producer = producer
        self._failures = failures
        self._runner = asyncio.Runner()
        self._connection: asyncpg.Connection[asyncpg.Record] = self._runner.run(_connect(dsn))

    def write(self, rows: list[Row], positions: dict[int, int]) -> None:
        """Make the rows and the changelog durable, then commit the offsets."""
        self._runner.run(self._upsert(rows))
        late = self._producer.flush(30)
        if late or self._failures:
            raise RuntimeError(f"the changelog was not delivered: {late} late, failures {self._failures[:1]}")
        self._consumer.commit(
            offsets=[TopicPartition(self._topic, number, offset) for number, offset in positions.items()],
            asynchronous=True,
        )

    async def _upsert(self, rows: list[Row]) -> None:
        async with self._connection.transaction():
            await self._connection.copy_records_to_table("staged", records=rows)
            await self._connection.execute(UPSERT)


async def _connect(dsn: str) -> asyncpg.Connection[asyncpg.Record]:
    connection = await asyncpg.connect(dsn)
    await connection.execute(TABLE)
    await connection.execute(STAGE)
    return connection


def main() -> None:
    """Run until SIGTERM."""
    kafka: dict[str, Any] = json.loads(os.environ["BENCH_KAFKA"])
    topic, changelog = os.environ["BENCH_TOPIC"], os.environ["BENCH_CHANGELOG"]
    _create_changelog(kafka, topic, changelog)
    consumer = Consumer(
        {
            **kafka,
            "group.id": os.environ["BENCH_GROUP"],
            "auto.offset.reset": "earliest",
            "enable.auto.commit": False,
            "enable.auto.offset.store": False,
        }
    )
    failures: list[str] = []
    producer = Producer(
        {
            **kafka,
            "enable.idempotence": True,
            "linger.ms": 5,
            "queue.buffering.max.messages": 10 * BATCH_EVENTS,
            "delivery.report.only.error": True,
            "on_delivery": lambda error, _message: failures.append(str(error)),
        }
    )
    consumer.subscribe([topic])
    stopping: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, _frame: stopping.append(number))
    states: dict[str, Row] = {}
    with ThreadPoolExecutor(1) as thread:
        sink = thread.submit(Sink, os.environ["BENCH_DSN"], topic, consumer, producer, failures).result()
        pending: Future[None] | None = None
        while not stopping:
            messages = consumer.consume(BATCH_EVENTS, 0.05)
            rows, positions = _fold(messages, states, producer, changelog)
            if pending is not None:
                pending.result()
            pending = thread.submit(sink.write, rows, positions) if rows else None
    consumer.close()


def _fold(
    messages: list[Any], states: dict[str, Row], producer: Producer, changelog: str
) -> tuple[list[Row], dict[int, int]]:
    """Bring a batch into the states and the changelog; return the newest row of each file, and where to go on."""
    newest: dict[str, Row] = {}
    positions: dict[int, int] = {}
    for message in messages:
        if (error := message.error()) is not None:
            raise KafkaException(error)
        event = orjson.loads(message.value())
        uri = event["uri"]
        content = base64.b64decode(event["content"])
        known = states.get(uri)
        row = (uri, known[1] + 1 if known is not None else 1, blake3(content).digest(), len(content))
        states[uri] = newest[uri] = row
        partition = message.partition()
        positions[partition] = message.offset() + 1
        value = orjson.dumps((row[1], row[2].hex(), row[3]))
        producer.produce(changelog, key=message.key(), value=value, partition=partition)
    producer.poll(0)
    return list(newest.values()), positions


def _create_changelog(kafka: dict[str, Any], topic: str, changelog: str) -> None:
    admin = AdminClient(kafka)
    partitions = len(admin.list_topics(topic, timeout=10).topics[topic].partitions)
    new = NewTopic(changelog, partitions, -1, config={"cleanup.policy": "compact"})
    admin.create_topics([new])[changelog].result(20)


if __name__ == "__main__":
    main()
