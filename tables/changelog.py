"""Recovery: brings a partition's store up to the end of its changelog, in batches of committed records.

The end is reached by the consumer's position, not by its last record: the last offsets of a transactional log are
markers that no consumer ever sees.
"""

from __future__ import annotations

import time

import msgspec
from aiokafka import AIOKafkaConsumer, TopicPartition
from aiokafka.structs import ConsumerRecord

from pipeline.errors import RecoveryFailed
from pipeline.events import PROGRESS_KEY, Progress, decode_change, decode_progress
from pipeline.kafka import kafka_errors, kafka_options
from pipeline.logs import get_logger
from pipeline.settings import Settings
from tables.files import resume
from tables.store import PartitionStore

log = get_logger("stampline.changelog")

_FETCH_BYTES = 8 * 2**20
_POLL_MS = 200


async def restore(settings: Settings, changelog: TopicPartition, store: PartitionStore) -> int:
    """Read the changelog from the store's position to its end into the store; return the records read.

    Raises:
        RecoveryFailed: the changelog is shorter than what the store has seen, or a record cannot be read.
        ServiceUnavailable: Kafka does not answer.
    """
    started = time.monotonic()
    consumer = AIOKafkaConsumer(
        **kafka_options(settings),
        isolation_level="read_committed",
        enable_auto_commit=False,
        auto_offset_reset="none",
        max_partition_fetch_bytes=_FETCH_BYTES,
        fetch_max_bytes=_FETCH_BYTES,
        fetch_max_wait_ms=_POLL_MS,
    )
    with kafka_errors(settings, topic=changelog.topic):
        await consumer.start()
        try:
            records = await _read(consumer, changelog, store)
        finally:
            await consumer.stop()
    log.info(
        "partition_recovered",
        topic=changelog.topic,
        partition=changelog.partition,
        records=records,
        keys=len(store.values),
        duration_ms=round((time.monotonic() - started) * 1000),
    )
    return records


async def _read(consumer: AIOKafkaConsumer, tp: TopicPartition, store: PartitionStore) -> int:
    consumer.assign([tp])
    begin = (await consumer.beginning_offsets([tp]))[tp]
    end = (await consumer.end_offsets([tp]))[tp]
    if store.position > end:
        raise RecoveryFailed(
            f"{tp.topic} partition {tp.partition} ends at {end}, but was read up to {store.position} before: "
            "the topic was made anew; restart this node"
        )
    position = max(begin, store.position)
    consumer.seek(tp, position)
    tail: list[bytes] = []
    count = 0
    while position < end:
        for record in (await consumer.getmany(tp, timeout_ms=_POLL_MS)).get(tp, ()):
            count += 1
            key, value = record.key, record.value
            if key == PROGRESS_KEY:
                store.progress = _progress(record)
                tail.clear()
            elif value is None:
                store.values.pop(key, None)
            else:
                store.values[key] = value
                tail.append(value)
        position = await consumer.position(tp)
        # The embedded broker tells the base of the last batch as its end; what a fetch tells is right.
        end = max(end, consumer.last_stable_offset(tp) or 0)
    store.position = position
    if tail:
        store.progress = resume(store.progress, [decode_change(value) for value in tail])
    return count


def _progress(record: ConsumerRecord[bytes, bytes]) -> Progress:
    try:
        return decode_progress(record.value or b"")
    except msgspec.DecodeError as exc:
        raise RecoveryFailed(
            f"{record.topic} partition {record.partition} offset {record.offset} is no progress record ({exc}): "
            "was it written by a newer version? Run that one"
        ) from exc
