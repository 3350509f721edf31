"""Where every partition stands on the road, hop by hop, and what the nodes say that they are doing with it.

The nodes are found by their consumer groups: each member's metadata holds the address of its process, and the process
is asked there for `/health/ready` (`pipeline/health.py`). Its pages are on loopback, so only those of this host can be,
and whoever answers has to be the one that the group knows.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Final, Literal

import aiohttp
import msgspec
from aiokafka import TopicPartition
from aiokafka.admin import AIOKafkaAdminClient
from aiokafka.coordinator.protocol import ConsumerProtocolMemberAssignment, ConsumerProtocolMemberMetadata
from faust.types import TP
from yarl import URL

from agents import hasher, projector, reducer, retry
from pipeline.errors import StamplineError
from pipeline.health import has_failed
from pipeline.lanes import Label, label
from pipeline.logreader import LogReader
from pipeline.postgres import PostgresConnectionManager
from pipeline.settings import Settings
from pipeline.topics import (
    DEAD_LETTERS,
    FILE_EVENTS,
    FILE_STAMPS,
    FILES_CHANGELOG,
    RETRY,
    admin_client,
    require_topics,
    topic_name,
)
from projections.queries import query

#: The group of each role, and the topics whose partitions it shares out, the main one first.
_GROUPS: Final = {
    "hasher": (hasher.APP_ID, (FILE_EVENTS,)),
    "reducer": (reducer.APP_ID, (FILE_STAMPS,)),
    "retry": (retry.APP_ID, (RETRY,)),
    "projector": (projector.APP_ID, (FILES_CHANGELOG, DEAD_LETTERS)),
}
#: Longest the broker may take to describe the groups, and a node to answer, in s.
_DESCRIBE_SECONDS: Final = 5.0
_ANSWER_SECONDS: Final = 2.0
#: So few offsets that are not visible are looked at.
_COUNTED_MAX: Final = 100
#: What is shown of a partition whose node gives no answer.
_UNREACHABLE: Final = "not reachable"


# The label of a partition as a key of JSON (`pipeline.lanes.Label`).
_Label = Annotated[str, msgspec.Meta(pattern=r"^([A-Za-z0-9._-]{1,249}/)?[0-9]{1,9}$")]


class _Metadata(msgspec.Struct):
    """What is needed of what Faust tells its group about a member (`faust.assignor.client_assignment`)."""

    url: str


class _Answer(msgspec.Struct):
    """What is needed of a node's `/health/ready`."""

    ready: bool
    node: str
    roles: dict[Literal["hasher", "reducer", "retry", "projector"], dict[_Label, str]]


@dataclass(frozen=True, slots=True)
class PartitionStatus:
    """How far one partition has come.

    `events_end` is the offset after the newest event; `hashed` and `visible` are the next input offsets of the hasher
    and of the projections; `behind` is how many events are not visible yet (where that is many: how many offsets, so
    markers of transactions too). The reducer counts stamps: `stamps_end` and `reduced`.
    """

    partition: int
    events_end: int
    hashed: int
    stamps_end: int
    reduced: int
    visible: int
    behind: int


@dataclass(frozen=True, slots=True)
class NodeStatus:
    """One process: its name (host and process id), where its pages are, what each partition of its roles is doing.

    `ready` is None where the process could not be asked; its partitions are then those that the groups gave it.
    """

    node: str
    web: str
    ready: bool | None
    roles: dict[str, dict[str, str]]


@dataclass(frozen=True, slots=True)
class Status:
    """The services (`ok`, or what is wrong), the partitions, none where a service is away, and the nodes."""

    kafka: str
    database: str
    partitions: list[PartitionStatus]
    nodes: list[NodeStatus] = field(default_factory=list)

    @property
    def healthy(self) -> bool:
        """Whether both services answer, and no node says that a partition of it has failed.

        A partition that nobody owns, that is being recovered, or whose node cannot be asked is no failure: nodes may
        be stopped on purpose, and be on another host.
        """
        said = [status for node in self.nodes for role in node.roles.values() for status in role.values()]
        return self.kafka == self.database == "ok" and not any(
            has_failed(status) for status in said if status != _UNREACHABLE
        )


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
    return Status("ok", database, partitions, await read_nodes(settings))


async def _read_partitions(settings: Settings, visible: dict[int, int]) -> list[PartitionStatus]:
    count = await require_topics(settings)
    events, stamps = topic_name(settings, FILE_EVENTS), topic_name(settings, FILE_STAMPS)
    async with admin_client(settings) as client:
        hashed = await _committed(client, topic_name(settings, hasher.APP_ID), events, count)
        reduced = await _committed(client, topic_name(settings, reducer.APP_ID), stamps, count)
    ends = await asyncio.gather(*(_look(settings, events, number, visible.get(number, 0)) for number in range(count)))
    stamps_ends = await asyncio.gather(*(_end(settings, stamps, partition) for partition in range(count)))
    return [
        PartitionStatus(
            partition=partition,
            events_end=ends[partition][0],
            hashed=hashed.get(partition, 0),
            stamps_end=stamps_ends[partition],
            reduced=reduced.get(partition, 0),
            visible=visible.get(partition, 0),
            behind=ends[partition][1],
        )
        for partition in range(count)
    ]


async def _committed(client: AIOKafkaAdminClient, group: str, topic: str, partitions: int) -> dict[int, int]:
    # By name: the embedded broker hangs up on a question for all partitions of a group.
    asked = [TopicPartition(topic, partition) for partition in range(partitions)]
    offsets: dict[TopicPartition, Any] = await client.list_consumer_group_offsets(group, partitions=asked)
    return {tp.partition: int(found.offset) for tp, found in offsets.items() if found.offset >= 0}


async def _look(settings: Settings, topic: str, partition: int, visible: int) -> tuple[int, int]:
    """Return the end of a log, and how many of its events are not visible yet."""
    async with LogReader(settings, topic, partition) as reader:
        end = await reader.find_end()
        if not 0 < end - visible <= _COUNTED_MAX:
            return end, max(0, end - visible)
        # What the retry role has sent last ends with a marker, which will never be visible.
        return end, sum([len(records) async for records in reader.read(visible, end)])


async def _end(settings: Settings, topic: str, partition: int) -> int:
    async with LogReader(settings, topic, partition) as reader:
        return await reader.find_end()


async def read_nodes(settings: Settings) -> list[NodeStatus]:
    """Find the nodes and ask them; as many as can be found, for not every broker describes its groups."""
    found: dict[URL, dict[str, list[Label]]] = {}
    try:
        async with asyncio.timeout(_DESCRIBE_SECONDS), admin_client(settings) as client:
            for role, (app_id, topics) in _GROUPS.items():
                # One by one: aiokafka reads the answer for several groups of one broker wrong.
                [response] = await client.describe_consumer_groups([topic_name(settings, app_id)])
                for url, partitions in read_members(settings, response, topics):
                    found.setdefault(url, {})[role] = partitions
    except (StamplineError, TimeoutError, ValueError):
        pass  # What was found until then is all there is to tell.
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(_ANSWER_SECONDS)) as session:
        return list(await asyncio.gather(*(ask(session, url, roles) for url, roles in sorted(found.items()))))


def read_members(settings: Settings, response: Any, topics: Sequence[str]) -> list[tuple[URL, list[Label]]]:
    """Return the address and the partitions of each member of the described group, whose metadata can be read.

    Args:
        settings: the prefix of the topics.
        response: the broker's description of the group.
        topics: the topics whose partitions the group shares out, the main one first.
    """
    names = [topic_name(settings, topic) for topic in topics]
    found = []
    for group in response.groups:
        for _member_id, _client_id, _host, metadata, assignment in group[5]:
            try:
                said = msgspec.json.decode(ConsumerProtocolMemberMetadata.decode(metadata).user_data, type=_Metadata)
                url = URL(said.url)
                given = ConsumerProtocolMemberAssignment.decode(assignment).assignment if assignment else []
            except (ValueError, TypeError, msgspec.MsgspecError):
                continue  # A member that is about to join has none yet; or the group is not one of ours.
            assigned = {topic: sorted(numbers) for topic, numbers in given}
            tps = [TP(name, number) for name in names for number in assigned.get(name, ())]
            found.append((url, [label(settings, names[0], tp) for tp in tps]))
    return found


async def ask(session: aiohttp.ClientSession, url: URL, given: Mapping[str, Sequence[Label]]) -> NodeStatus:
    """Ask a node. One on another host cannot be asked, and its address may be another node's on this one."""
    node, web = url.user or "", f"http://{url.host}:{url.port}"
    # Nothing but our own addresses: anybody could have put another one into a group.
    if url.host == "127.0.0.1":
        try:
            async with session.get(f"{web}/health/ready", allow_redirects=False) as response:
                answer = msgspec.json.decode(await response.read(), type=_Answer)
            if answer.node == node:
                return NodeStatus(node, web, answer.ready, _by_name(answer.roles))
        except (aiohttp.ClientError, TimeoutError, msgspec.MsgspecError):
            pass  # It has just gone, or its port is somebody else's now.
    unknown = {role: dict.fromkeys(partitions, _UNREACHABLE) for role, partitions in given.items()}
    return NodeStatus(node, web, None, _by_name(unknown))


def _by_name(roles: Mapping[Any, Mapping[Any, str]]) -> dict[str, dict[str, str]]:
    return {role: {str(label): said for label, said in partitions.items()} for role, partitions in roles.items()}
