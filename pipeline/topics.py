"""The topics of stampline: their literal names, their shape, and how they are made and checked.

All topics of the road of an event have the same number of partitions, because partition i of one hop is written to
partition i of the next.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Final

from aiokafka.admin import AIOKafkaAdminClient, NewTopic
from aiokafka.admin.config_resource import ConfigResource, ConfigResourceType
from aiokafka.errors import TopicAlreadyExistsError, for_code

from pipeline.errors import SettingsError, TopicError
from pipeline.kafka import kafka_errors, kafka_options
from pipeline.settings import Settings

FILE_EVENTS: Final = "file-events"
FILE_STAMPS: Final = "file-stamps"
FILES_CHANGELOG: Final = "stampline-reducer-files-changelog"
RETRY: Final = "file-events-retry"
DEAD_LETTERS: Final = "file-events-dlq"

#: A producer may send up to this; the hasher turns what is over the contract's 1 MiB into a dead letter.
_EVENT_MAX_BYTES: Final = 8 * 2**20
#: A record batch of ours; a dead letter must fit with its headers.
RECORD_BATCH_MAX_BYTES: Final = 16 * 2**20
_DAY_MS: Final = 24 * 3600 * 1000

#: Longest wait for topics that were just made, in s.
_CREATION_SECONDS: Final = 20.0

#: What the embedded broker (Tansu) calls its cluster: the one broker without transactions.
_EMBEDDED_CLUSTER: Final = "tansu_cluster"


@dataclass(frozen=True, slots=True)
class TopicSpec:
    """The shape of one topic: its name without the prefix, and the broker settings that stampline relies on."""

    name: str
    configs: Mapping[str, str]


def _deleted_after(days: int, max_bytes: int = RECORD_BATCH_MAX_BYTES) -> dict[str, str]:
    return {
        "cleanup.policy": "delete",
        "retention.ms": str(days * _DAY_MS),
        "max.message.bytes": str(max_bytes),
    }


#: Compaction waits 7 days, so that a projector that is behind still finds the whole history.
_COMPACTED: Final = {
    "cleanup.policy": "compact",
    "min.compaction.lag.ms": str(7 * _DAY_MS),
    "max.message.bytes": str(RECORD_BATCH_MAX_BYTES),
}

TOPICS: Final[tuple[TopicSpec, ...]] = (
    TopicSpec(FILE_EVENTS, _deleted_after(7, _EVENT_MAX_BYTES)),
    TopicSpec(FILE_STAMPS, _deleted_after(7)),
    TopicSpec(FILES_CHANGELOG, _COMPACTED),
    TopicSpec(RETRY, _deleted_after(7)),
    TopicSpec(DEAD_LETTERS, _deleted_after(30)),
)


@dataclass(frozen=True, slots=True)
class TopicCheck:
    """What `check_topics` found out about one topic; `fault` is None where all is well."""

    name: str
    partitions: int | None
    fault: str | None


def topic_name(settings: Settings, name: str) -> str:
    """Return the name of a topic, a group or a transactional id with this deployment's prefix."""
    return settings.kafka_topic_prefix + name


@asynccontextmanager
async def admin_client(settings: Settings) -> AsyncIterator[AIOKafkaAdminClient]:
    """Open a connection for asking and making.

    Raises:
        ServiceUnavailable: no broker answers, or it stops answering.
    """
    client = AIOKafkaAdminClient(**kafka_options(settings))
    with kafka_errors(settings):
        try:
            await client.start()
            yield client
        finally:
            await client.close()


async def has_transactions(settings: Settings) -> bool:
    """Tell whether this broker can do transactions and idempotent producers: all can but the embedded one.

    Raises:
        SettingsError: KAFKA_TRANSACTIONS=on on the embedded broker.
        ServiceUnavailable: no broker answers.
    """
    async with admin_client(settings) as client:
        cluster = await client.describe_cluster()
    able: bool = cluster["cluster_id"] != _EMBEDDED_CLUSTER
    if not able and settings.kafka_transactions == "on":
        raise SettingsError("KAFKA_TRANSACTIONS=on, but the embedded broker has none: use another broker or auto")
    return able


async def create_topics(settings: Settings) -> list[str]:
    """Make every topic that is missing and return the names of those made. What exists is left as it is.

    Raises:
        TopicError: a topic cannot be made.
        ServiceUnavailable: no broker answers.
    """
    made = []
    async with admin_client(settings) as client:
        for spec in TOPICS:
            name = topic_name(settings, spec.name)
            new = NewTopic(name, settings.kafka_topic_partitions, 1, topic_configs=dict(spec.configs))
            # aiokafka's constructor refuses -1, Kafka's word for the broker's default.
            new.replication_factor = settings.kafka_topic_replication_factor or -1
            code, message = (await client.create_topics([new])).topic_errors[0][1:3]
            if code == 0:
                made.append(name)
            elif for_code(code) is not TopicAlreadyExistsError:
                raise TopicError(f"topic {name} cannot be made: {message or for_code(code).__name__}")
        await _wait_for_topics(client, made)
    return made


async def _wait_for_topics(client: AIOKafkaAdminClient, names: Sequence[str]) -> None:
    """Wait until the broker tells of all topics: it answers before it knows what it has made."""
    deadline = time.monotonic() + _CREATION_SECONDS
    while names and any(topic["error_code"] for topic in await client.describe_topics(list(names))):
        if time.monotonic() > deadline:
            raise TopicError(f"not all topics were there after {_CREATION_SECONDS:g} s; run `stampline topics check`")
        await asyncio.sleep(0.02)


async def check_topics(settings: Settings) -> list[TopicCheck]:
    """Compare every topic with what stampline needs.

    Raises:
        ServiceUnavailable: no broker answers.
    """
    names = [topic_name(settings, spec.name) for spec in TOPICS]
    async with admin_client(settings) as client:
        described = {topic["topic"]: topic for topic in await client.describe_topics(names) if not topic["error_code"]}
        policies = await _cleanup_policies(client, [name for name in names if name in described])
    counts = {name: len(topic["partitions"]) for name, topic in described.items()}
    wanted = counts.get(topic_name(settings, FILE_EVENTS), settings.kafka_topic_partitions)
    return [
        _check(spec, name, counts.get(name), wanted, policies.get(name))
        for spec, name in zip(TOPICS, names, strict=True)
    ]


def _check(spec: TopicSpec, name: str, partitions: int | None, wanted: int, policy: str | None) -> TopicCheck:
    fault = None
    if partitions is None:
        fault = f"topic {name} is missing: run `stampline topics create`"
    elif partitions != wanted:
        fault = (
            f"topic {name} has {partitions} partitions where {FILE_EVENTS} has {wanted}: "
            "delete it and run `stampline topics create`"
            f" with KAFKA_TOPIC_PARTITIONS={wanted}, or add partitions until they are equal"
        )
    elif policy not in {None, spec.configs["cleanup.policy"]}:
        fault = f"topic {name} has cleanup.policy={policy}: set it to {spec.configs['cleanup.policy']}"
    return TopicCheck(name, partitions, fault)


async def _cleanup_policies(client: AIOKafkaAdminClient, names: Sequence[str]) -> dict[str, str]:
    if not names:
        return {}
    responses = await client.describe_configs([ConfigResource(ConfigResourceType.TOPIC, name) for name in names])
    return {
        resource[3]: entry[1]
        for response in responses
        for resource in response.resources
        for entry in resource[4]
        if entry[0] == "cleanup.policy"
    }


async def require_topics(settings: Settings) -> int:
    """Return the number of partitions of the road.

    Raises:
        TopicError: a topic is missing or differs, with one line for each.
        ServiceUnavailable: no broker answers.
    """
    checks = await check_topics(settings)
    faults = [check.fault for check in checks if check.fault]
    if faults:
        raise TopicError("\n".join(faults))
    return checks[0].partitions or 0
