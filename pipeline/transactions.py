"""The writer: sends a batch's outputs and its input offsets to Kafka, as one transaction where the hop needs one.

One writer belongs to one partition of one role. With a transactional id everything of a batch (changelog, dead
letters, retries, input offsets) commits together or not at all, and starting the writer fences whoever had that id
before: that is the only fence Kafka gives us, so it is started before anything of the partition is read.
Without one (the hasher; every role on the embedded broker) the outputs are delivered first and the offsets are
committed after them: at least once, made exact by the chain of input offsets.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Final, NamedTuple

import aiokafka.producer.sender
from aiokafka import AIOKafkaProducer, TopicPartition
from aiokafka.errors import InvalidProducerEpoch, KafkaError, ProducerFenced
from aiokafka.producer.message_accumulator import BatchBuilder
from aiokafka.structs import RecordMetadata
from faust.types import TP

from pipeline.errors import PartitionFenced, ServiceUnavailable
from pipeline.kafka import abandon, kafka_errors, kafka_options
from pipeline.records import Record
from pipeline.settings import Settings
from pipeline.topics import RECORD_BATCH_MAX_BYTES

# After a commit the coordinator answers CONCURRENT_TRANSACTIONS until its markers are written, which takes about
# 3 ms on a quiet broker. aiokafka then waits for this long; its 20 ms made a transaction take 33 ms instead of 12,
# and 2 ms is no better than 5 (measured on Apache Kafka 4.1).
aiokafka.producer.sender.BACKOFF_OVERRIDE = 0.005

#: Record batches are cut here, well below what the topics take.
_RECORD_BATCH_BYTES: Final = RECORD_BATCH_MAX_BYTES // 2
_RETRY_BACKOFF_MS: Final = 10
#: How long a cancelled transaction may take to abort before it is left to fencing.
_ABORT_TIMEOUT_SECONDS: Final = 1.0

CommitOffsets = Callable[[Mapping[TP, int]], Awaitable[None]]


class Writer:
    """Writes the batches of one partition. Opened by `open`, closed by `aclose`; a failed one is replaced.

    Args:
        settings: where Kafka is.
        partition: partition number, the same in every topic that is written.
        group: consumer group whose input offsets are committed.
        transactional_id: None = no transaction.
        idempotent: whether the broker can take an idempotent producer.
        commit_offsets: commits offsets as a plain consumer does, where there is no transaction.
    """

    def __init__(
        self,
        settings: Settings,
        *,
        partition: int,
        group: str,
        transactional_id: str | None,
        idempotent: bool,
        commit_offsets: CommitOffsets,
    ) -> None:
        self._settings = settings
        self._partition = partition
        self._group = group
        self._transactional = transactional_id is not None
        self._commit_offsets = commit_offsets
        self._producer = AIOKafkaProducer(
            **kafka_options(settings),
            acks="all",
            enable_idempotence=idempotent,
            transactional_id=transactional_id,
            # The broker aborts what a dead process left open, so that readers of committed records can go on.
            transaction_timeout_ms=max(1000, settings.kafka_session_timeout_ms - 1000),
            # A broker that is still writing the markers of the transaction before answers with a retriable error.
            retry_backoff_ms=_RETRY_BACKOFF_MS,
            max_batch_size=_RECORD_BATCH_BYTES,
            max_request_size=RECORD_BATCH_MAX_BYTES + 2**20,
        )

    async def open(self) -> None:
        """Connect; a transactional writer fences the one before it.

        Raises:
            ServiceUnavailable: Kafka does not answer.
        """
        with kafka_errors(self._settings):
            try:
                await self._producer.start()
            except BaseException:
                await self._producer.stop()
                raise

    async def aclose(self) -> None:
        """Disconnect. What was not committed is aborted by the broker; cancelled, it lets go of what is under way."""
        try:
            await self._producer.stop()
        except asyncio.CancelledError:
            await abandon(self._producer, "the partition was closed before Kafka answered")
            raise

    async def write(self, outputs: Mapping[str, Sequence[Record]], offsets: Mapping[TP, int]) -> dict[str, int]:
        """Write the outputs of one batch and commit its input offsets; return the next offset of each topic written.

        Raises:
            PartitionFenced: another process owns the partition now.
            ServiceUnavailable: nothing was written, or it is not known whether it was: open a new writer and read.
        """
        if not self._transactional:
            return await self._write_at_least_once(outputs, offsets)
        # Faust's TP is not the tuple that aiokafka asks for.
        positions = {TopicPartition(*tp): offset for tp, offset in offsets.items()}
        try:
            await self._producer.begin_transaction()
            deliveries = await self._send_all(outputs)
            await asyncio.gather(
                *(delivery.metadata for delivery in deliveries),
                self._producer.send_offsets_to_transaction(positions, self._group),
            )
        except (ProducerFenced, InvalidProducerEpoch) as exc:
            raise PartitionFenced from exc
        except KafkaError as exc:
            await self._abort()
            # Not to be tried again with this writer: what was not delivered has used up sequence numbers, and the
            # broker takes no others after them.
            raise ServiceUnavailable(f"transaction aborted: {exc}") from exc
        except asyncio.CancelledError:
            await asyncio.wait([asyncio.ensure_future(self._abort())], timeout=_ABORT_TIMEOUT_SECONDS)
            raise
        await self._commit()
        return _next_offsets(deliveries)

    async def _commit(self) -> None:
        """Commit; once asked for, the outcome is the broker's, so a cancellation waits for it."""
        commit = asyncio.ensure_future(self._producer.commit_transaction())
        try:
            await asyncio.shield(commit)
        except asyncio.CancelledError:
            await asyncio.wait([commit], timeout=_ABORT_TIMEOUT_SECONDS)
            commit.cancel()
            raise
        except (ProducerFenced, InvalidProducerEpoch) as exc:
            raise PartitionFenced from exc
        except KafkaError as exc:
            raise ServiceUnavailable(f"the commit of a transaction was not confirmed: {exc}") from exc

    async def _abort(self) -> None:
        try:
            await self._producer.abort_transaction()
        except (ProducerFenced, InvalidProducerEpoch) as exc:
            raise PartitionFenced from exc
        except KafkaError as exc:
            raise ServiceUnavailable(f"a transaction cannot be aborted: {exc}") from exc

    async def _write_at_least_once(
        self, outputs: Mapping[str, Sequence[Record]], offsets: Mapping[TP, int]
    ) -> dict[str, int]:
        deliveries: list[_Delivery] = []
        try:
            # Topic by topic: what a caller puts last is there only if everything before it is.
            for topic, records in outputs.items():
                sent = await self._send_all({topic: records})
                await asyncio.gather(*(delivery.metadata for delivery in sent))
                deliveries += sent
        except KafkaError as exc:
            raise ServiceUnavailable(f"outputs were not delivered: {exc}") from exc
        await self._commit_offsets(offsets)
        return _next_offsets(deliveries)

    async def _send_all(self, outputs: Mapping[str, Sequence[Record]]) -> list[_Delivery]:
        """Hand every record to the producer; return the delivery of each record batch."""
        deliveries: list[_Delivery] = []
        for topic, records in outputs.items():
            batch, count = self._producer.create_batch(), 0
            for key, value, headers in records:
                if batch.append(timestamp=None, key=key, value=value, headers=list(headers)) is None:
                    deliveries.append(await self._send(topic, count, batch))
                    batch, count = self._producer.create_batch(), 0
                    batch.append(timestamp=None, key=key, value=value, headers=list(headers))
                count += 1
            if count:
                deliveries.append(await self._send(topic, count, batch))
        return deliveries

    async def _send(self, topic: str, count: int, batch: BatchBuilder) -> _Delivery:
        return _Delivery(topic, count, await self._producer.send_batch(batch, topic, partition=self._partition))


class _Delivery(NamedTuple):
    topic: str
    records: int
    metadata: asyncio.Future[RecordMetadata]

    def next_offset(self) -> int:
        """The offset after the last record of the batch; the batch must have been delivered."""
        base_offset: int = self.metadata.result().offset
        return base_offset + self.records


def _next_offsets(deliveries: Sequence[_Delivery]) -> dict[str, int]:
    return {delivery.topic: delivery.next_offset() for delivery in deliveries}
