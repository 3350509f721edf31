"""Where every partition stands on the road, hop by hop, in input offsets where they are known."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import Any

from aiokafka import TopicPartition
from aiokafka.admin import AIOKafkaAdminClient

from agents import hasher, reducer
from pipeline.errors import StamplineError
from pipeline.logreader import LogReader
from pipeline.postgres import PostgresConnectionManager
from pipeline.settings import Settings
from pipeline.topics import FILE_EVENTS, FILE_STAMPS, admin_client, require_topics, topic_name
from projections.queries import query


@dataclass(frozen=True, slots=True)
class PartitionStatus:
    """How far one partition has come.

    `events_end` is the offset after the newest event; `hashed` and `visible` are the next input offsets of the hasher
    and of the projections; `behind` is how many offsets are not visible yet. The reducer counts stamps:
    `stamps_end` and `reduced`.
    """

    partition: int
    events_end: int
    hashed: int
    stamps_end: int
    reduced: int
    visible: int
    behind: int


@dataclass(frozen=True, slots=True)
class Status:
    """The services (`ok`, or what is wrong) and the partitions, none where a service is away."""

    kafka: str
    database: str
    partitions: list[PartitionStatus]


async def read_status(settings: Settings) -> Status:
    """Ask Kafka and PostgreSQL; a service that does not answer is part of the answer."""
    database, visible = "ok", {}
    try:
        async with PostgresConnectionManager(settings) as manager, manager.connection() as connection:
            rows = await connection.fetch(query("input_watermarks"))
            visible = {row["partition"]: row["input_offset"] for row in rows}
    except StamplineError as exc:
        database = str(exc)
    try:
        partitions = await _read_partitions(settings, visible)
    except StamplineError as exc:
        return Status(str(exc), database, [])
    return Status("ok", database, partitions)


async def _read_partitions(settings: Settings, visible: dict[int, int]) -> list[PartitionStatus]:
    count = await require_topics(settings)
    events, stamps = topic_name(settings, FILE_EVENTS), topic_name(settings, FILE_STAMPS)
    async with admin_client(settings) as client:
        hashed = await _committed(client, topic_name(settings, hasher.APP_ID), events, count)
        reduced = await _committed(client, topic_name(settings, reducer.APP_ID), stamps, count)
    events_ends = await asyncio.gather(*(_end(settings, events, partition) for partition in range(count)))
    stamps_ends = await asyncio.gather(*(_end(settings, stamps, partition) for partition in range(count)))
    return [
        PartitionStatus(
            partition=partition,
            events_end=events_ends[partition],
            hashed=hashed.get(partition, 0),
            stamps_end=stamps_ends[partition],
            reduced=reduced.get(partition, 0),
            visible=visible.get(partition, 0),
            behind=max(0, events_ends[partition] - visible.get(partition, 0)),
        )
        for partition in range(count)
    ]


async def _committed(client: AIOKafkaAdminClient, group: str, topic: str, partitions: int) -> dict[int, int]:
    # By name: the embedded broker hangs up on a question for all partitions of a group.
    asked = [TopicPartition(topic, partition) for partition in range(partitions)]
    offsets: dict[TopicPartition, Any] = await client.list_consumer_group_offsets(group, partitions=asked)
    return {tp.partition: int(found.offset) for tp, found in offsets.items() if found.offset >= 0}


async def _end(settings: Settings, topic: str, partition: int) -> int:
    async with LogReader(settings, topic, partition) as reader:
        return await reader.find_end()
