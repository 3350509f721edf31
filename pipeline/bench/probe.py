"""A look at Kafka from outside: how far a consumer group is, how long a topic is, and topics made and deleted.

Imports confluent-kafka, of the development tools: its admin client answers such questions in one request.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from typing import Any, Final, TypeVar

from confluent_kafka import Consumer, KafkaError, KafkaException, TopicPartition
from confluent_kafka.admin import AdminClient, NewTopic, OffsetSpec  # type: ignore[attr-defined]

from pipeline.bench.load import SILENT
from pipeline.errors import ServiceUnavailable

_TIMEOUT_SECONDS: Final = 30.0
_PAUSE_SECONDS: Final = 0.05
#: What the first group of a new broker meets.
_COORDINATOR_STARTS: Final = frozenset(
    {KafkaError.COORDINATOR_LOAD_IN_PROGRESS, KafkaError.COORDINATOR_NOT_AVAILABLE, KafkaError.NOT_COORDINATOR}
)

T = TypeVar("T")


class KafkaProbe:
    """Asks one Kafka; needs no closing.

    The admin client could ask for a group's offsets too, but librdkafka 2.16 then dies of a null pointer where the
    coordinator of the group is just starting (confluentinc/librdkafka#5040). A consumer that never joins does not.

    Args:
        options: how to reach it, as librdkafka takes it.
        partitions: of every topic that is made or asked about.
    """

    def __init__(self, options: Mapping[str, Any], *, partitions: int) -> None:
        self._options = {**options, **SILENT}
        self._admin = AdminClient(self._options)
        self._consumers: dict[str, Consumer] = {}
        self._partitions = partitions

    def committed(self, group: str, topic: str) -> int:
        """Return the sum of a group's committed offsets: how many events it has finished in a topic that began at 0.

        Raises:
            ServiceUnavailable: Kafka does not tell.
        """
        deadline = time.monotonic() + _TIMEOUT_SECONDS
        while True:
            try:
                found = self._consumer(group).committed(self._all(topic), timeout=_TIMEOUT_SECONDS)
            except KafkaException as exc:
                if exc.args[0].code() not in _COORDINATOR_STARTS or time.monotonic() > deadline:
                    raise ServiceUnavailable(f"Kafka does not tell the offsets of {group}: {exc}") from exc
                time.sleep(_PAUSE_SECONDS)
            else:
                # A partition without a commit says -1001.
                return sum(max(0, partition.offset) for partition in found)

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

    def _consumer(self, group: str) -> Consumer:
        if group not in self._consumers:
            # By default it would wait for a group in the middle of a transaction.
            isolation = {"isolation.level": "read_uncommitted", "enable.auto.commit": False}
            self._consumers[group] = Consumer({**self._options, **isolation, "group.id": group})
        return self._consumers[group]

    def _all(self, topic: str) -> list[TopicPartition]:
        return [TopicPartition(topic, number) for number in range(self._partitions)]


def _answer(future: Future[T]) -> T:
    return future.result(_TIMEOUT_SECONDS)
