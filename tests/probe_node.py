"""A node of a role that only takes notes, and what its group has committed: the transport on real Kafka."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from contextlib import asynccontextmanager
from typing import Any, Final

from aiokafka import AIOKafkaConsumer, AIOKafkaProducer, TopicPartition
from faust.types import TP, StreamT

from pipeline.app import RoleApp
from pipeline.lanes import Batch
from pipeline.settings import Settings
from pipeline.topics import FILE_EVENTS, create_topics, topic_name
from pipeline.transport import BatchConsumer

PROBE_ID: Final = "probe"

Step = Callable[[Batch], Awaitable[None]]


class Probe:
    """A role that commits as the hasher does, and notes what it gets; `before` is done to each batch before that."""

    def __init__(self) -> None:
        self.before: Step | None = None
        self.begun: Counter[int] = Counter()
        self.opened: Counter[int] = Counter()
        self.taken: dict[int, list[int]] = {0: [], 1: []}
        self._consumer: BatchConsumer | None = None

    async def open(self, tp: TP, consumer: BatchConsumer) -> int:
        """Go on where the group is."""
        self._consumer = consumer
        self.opened[tp.partition] += 1
        log_range = await consumer.log_range(tp)
        return log_range.begin if log_range.committed is None else log_range.committed

    async def close(self, tp: TP) -> None:
        """Keep nothing."""

    def retain(self, tps: Iterable[TP]) -> None:
        """Keep nothing."""

    async def process(self, batch: Batch) -> None:
        """Take a batch."""
        assert self._consumer is not None
        self.begun[batch.tp.partition] += 1
        if self.before is not None:
            await self.before(batch)
        await self._consumer.commit_offsets({batch.tp: batch.next_offset})
        self.taken[batch.tp.partition] += [record.offset for record in batch.records]


class Ground:
    """Two partitions of events, and what the group of a role has committed of its input."""

    def __init__(self, settings: Settings, client: AIOKafkaConsumer, source: str) -> None:
        self.settings = settings
        self.topic = topic_name(settings, FILE_EVENTS)
        self._source = topic_name(settings, source)
        self._client = client

    @asynccontextmanager
    async def running(self, probe: Probe) -> AsyncIterator[RoleApp]:
        """Run a node of the probe."""
        app = RoleApp(PROBE_ID, self.settings, probe, transactions=True)

        @app.agent(app.batches(FILE_EVENTS), name=PROBE_ID)
        async def pass_on(batches: StreamT[Batch]) -> None:
            async for batch in batches:
                batch.start(probe.process)

        await app.start()
        try:
            yield app
        finally:
            await app.stop()

    async def send(self, partition: int, count: int) -> list[int]:
        """Send events and return their offsets."""
        producer = AIOKafkaProducer(bootstrap_servers=self.settings.kafka_bootstrap_servers)
        await producer.start()
        try:
            futures = [await self._send(producer, partition, number) for number in range(count)]
            return [(await future).offset for future in futures]
        finally:
            await producer.stop()

    async def _send(self, producer: AIOKafkaProducer, partition: int, number: int) -> Any:
        return await producer.send(self.topic, value=b"%d" % number, key=b"k", partition=partition)

    async def send_in_transactions(self, partition: int, *counts: int) -> list[int]:
        """Send that many events in a transaction each, a negative number in one that is aborted."""
        producer = AIOKafkaProducer(
            bootstrap_servers=self.settings.kafka_bootstrap_servers, transactional_id=f"{self.topic}-test"
        )
        await producer.start()
        offsets = []
        try:
            for count in counts:
                await producer.begin_transaction()
                futures = [await self._send(producer, partition, number) for number in range(abs(count))]
                sent = [(await future).offset for future in futures]
                if count > 0:
                    await producer.commit_transaction()
                    offsets += sent
                else:
                    await producer.abort_transaction()
        finally:
            await producer.stop()
        return offsets

    async def commit(self, partition: int, offset: int) -> None:
        """Commit as somebody else before."""
        place = TopicPartition(self._source, partition)
        self._client.assign([place])
        await self._client.commit({place: offset})
        self._client.unsubscribe()

    async def committed(self, partition: int) -> int | None:
        """What the group has committed."""
        offset: int | None = await self._client.committed(TopicPartition(self._source, partition))
        return offset

    async def until_committed(self, partition: int, offset: int) -> None:
        """Wait for a commit."""
        async with asyncio.timeout(60):
            while await self.committed(partition) != offset:
                pass  # Asking takes its time.


@asynccontextmanager
async def open_ground(settings: Settings, app_id: str, source: str) -> AsyncIterator[Ground]:
    """Make the topics, and look at what a role's group commits of its input."""
    await create_topics(settings)
    client = AIOKafkaConsumer(
        bootstrap_servers=settings.kafka_bootstrap_servers,
        group_id=topic_name(settings, app_id),
        enable_auto_commit=False,
    )
    await client.start()
    try:
        yield Ground(settings, client, source)
    finally:
        await client.stop()
