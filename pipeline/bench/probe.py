"""A look at Kafka from outside: how far a consumer group is, how long a topic is, and topics made and deleted.

Imports confluent-kafka, of the development tools: its admin client answers such questions in one request.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from typing import Any, Final, TypeVar

from confluent_kafka import ConsumerGroupTopicPartitions, KafkaError, KafkaException, TopicPartition
from confluent_kafka.admin import AdminClient, NewTopic, OffsetSpec  # type: ignore[attr-defined]

from pipeline.bench.load import SILENT
from pipeline.errors import ServiceUnavailable

_TIMEOUT_SECONDS: Final = 30.0
_PAUSE_SECONDS: Final = 0.05
_COORDINATOR_STARTS: Final = frozenset(
    {
        KafkaError.COORDINATOR_LOAD_IN_PROGRESS,
        KafkaError.COORDINATOR_NOT_AVAILABLE,
        KafkaError.NOT_COORDINATOR,
    }
)

T = TypeVar("T")


class KafkaProbe:
    """Asks one Kafka; needs no closing.

    Args:
        options: how to reach it, as librdkafka takes it.
        partitions: of every topic that is made or asked about.
    """

    def __init__(self, options: Mapping[str, Any], *, partitions: int) -> None:
        self._admin = AdminClient({**options, **SILENT})
        self._partitions = partitions

    def committed(self, group: str, topic: str) -> int:
        """Return the sum of a group's committed offsets: how many events it has finished in a topic that began at 0.

        Raises:
            ServiceUnavailable: Kafka does not tell.
        """
        asked = ConsumerGroupTopicPartitions(group, self._all(topic))
        deadline = time.monotonic() + _TIMEOUT_SECONDS
        while True:
            # Not `require_stable`: a group in the middle of a transaction would have no answer.
            [answer] = self._admin.list_consumer_group_offsets([asked], require_stable=False).values()
            try:
                found = _answer(answer)
            except KafkaException as exc:
                # The first group of a new broker waits for its coordinator; librdkafka does not call that retriable.
                if exc.args[0].code() not in _COORDINATOR_STARTS or time.monotonic() > deadline:
                    raise ServiceUnavailable(f"Kafka does not tell the offsets of {group}: {exc}") from exc
                time.sleep(_PAUSE_SECONDS)
            else:
                # A partition without a commit says -1001.
                return sum(max(0, partition.offset) for partition in found.topic_partitions)

    def end_offsets(self, topic: str) -> int:
        """Return the sum of a topic's end offsets: its records, and markers of transactions where it has some."""
        latest = OffsetSpec.latest()  # type: ignore[no-untyped-call]
        answers = self._admin.list_offsets(dict.fromkeys(self._all(topic), latest))
        return sum(_answer(answer).offset for answer in answers.values())

    def create_topic(self, name: str, configs: Mapping[str, str], *, replication_factor: int | None) -> None:
        """Make a topic.

        Raises:
            ServiceUnavailable: it cannot be made.
        """
        topic = NewTopic(name, self._partitions, replication_factor or -1, config=dict(configs))
        try:
            _answer(self._admin.create_topics([topic])[name])
        except KafkaException as exc:
            raise ServiceUnavailable(f"topic {name} cannot be made: {exc}") from exc

    def delete_topics(self, names: Sequence[str]) -> None:
        """Delete topics, those that exist."""
        existing = self._admin.list_topics(timeout=_TIMEOUT_SECONDS).topics
        if here := [name for name in names if name in existing]:
            for answer in self._admin.delete_topics(here).values():
                _answer(answer)

    def _all(self, topic: str) -> list[TopicPartition]:
        return [TopicPartition(topic, number) for number in range(self._partitions)]


def _answer(future: Future[T]) -> T:
    return future.result(_TIMEOUT_SECONDS)
