"""Reading one partition's log, outside any consumer group: committed records, in batches, to an end or for ever.

The end is reached by position, not by the last record: the last offsets of a transactional log are markers that no
consumer ever sees.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from types import TracebackType
from typing import Any, Final, Self

from aiokafka import AIOKafkaConsumer, TopicPartition

from pipeline.errors import PositionLost
from pipeline.kafka import kafka_errors, kafka_options
from pipeline.settings import Settings

_FETCH_BYTES: Final = 8 * 2**20
_POLL_MS: Final = 200


class LogReader:
    """Reads one partition; an async context manager. `begin` and `end` are the log's bounds when it was opened.

    Args:
        settings: where Kafka is.
        topic: what to read.
        partition: its partition.
        wait_ms: how long one request for records waits for the first of them; what comes is told at once.
    """

    def __init__(self, settings: Settings, topic: str, partition: int, *, wait_ms: int = _POLL_MS) -> None:
        self._settings = settings
        self._wait_ms = wait_ms
        self._tp = TopicPartition(topic, partition)
        self._consumer = AIOKafkaConsumer(
            **kafka_options(settings),
            isolation_level="read_committed",
            enable_auto_commit=False,
            auto_offset_reset="none",
            max_partition_fetch_bytes=_FETCH_BYTES,
            fetch_max_bytes=_FETCH_BYTES,
            fetch_max_wait_ms=wait_ms,
        )
        self.begin = 0
        self.end = 0
        #: The next offset to read.
        self.position = 0

    async def __aenter__(self) -> Self:
        """Connect.

        Raises:
            ServiceUnavailable: Kafka does not answer.
        """
        with kafka_errors(self._settings, topic=self._tp.topic):
            try:
                await self._consumer.start()
                self._consumer.assign([self._tp])
                self.begin = (await self._consumer.beginning_offsets([self._tp]))[self._tp]
                self.end = (await self._consumer.end_offsets([self._tp]))[self._tp]
            except BaseException:
                await self._consumer.stop()
                raise
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self._consumer.stop()

    @property
    def place(self) -> str:
        """What it reads, for messages."""
        return f"{self._tp.topic} partition {self._tp.partition}"

    async def require(self, position: int) -> None:
        """Make sure that the log is not shorter than `position`.

        Raises:
            PositionLost: it is.
            ServiceUnavailable: Kafka stopped answering.
        """
        if position > self.end and position > await self.find_end():
            length = f"ends at {self.end}" if self.end else "is empty"
            raise PositionLost(
                f"{self._tp.topic} partition {self._tp.partition} {length}, but was read up to {position}"
            )

    async def read(
        self, start: int, until: int | None = None, records_max: int | None = None
    ) -> AsyncIterator[Sequence[Any]]:
        """Yield the records from `start` (or the log's begin, if that is later) to `until` (default: the end).

        Args:
            start: the first offset.
            until: the offset to stop before.
            records_max: most records at once, between which others on the loop have their turn; None = as they come.

        Raises:
            PositionLost: the log ends before `start` or `until`.
            ServiceUnavailable: Kafka stopped answering.
        """
        await self.require(start)
        self.position = max(start, self.begin)
        if self.end == 0 and (until or 0) > 0:
            raise PositionLost(f"{self.place} is empty, not read up to {until}")
        self._consumer.seek(self._tp, self.position)
        with kafka_errors(self._settings, topic=self._tp.topic):
            while self.position < (self.end if until is None else until):
                records = await self._fetch(records_max)
                if until is not None and records and records[-1].offset >= until:
                    records = [record for record in records if record.offset < until]
                    self.position = until
                if until is not None and not records and self.position == self.end < until:
                    raise PositionLost(f"{self.place} ends at {self.end}, before {until}")
                if records:
                    yield records

    async def follow(self, start: int, records_max: int | None = None) -> AsyncIterator[Sequence[Any]]:
        """Yield the records from `start` on, for ever; nothing at all where none came for a while.

        `position` and `end` are then those of that moment: what lies between them is still to come.

        Args:
            start: the first offset; unlike `read` it does not begin later where the log does.
            records_max: as in `read`.

        Raises:
            PositionLost: the log ends before `start`.
            ServiceUnavailable: Kafka stopped answering, or the log does not hold the position any more.
        """
        await self.require(start)
        self.position = start
        self._consumer.seek(self._tp, start)
        with kafka_errors(self._settings, topic=self._tp.topic):
            while True:
                yield await self._fetch(records_max)

    async def _fetch(self, records_max: int | None) -> Sequence[Any]:
        """Return the next records that were fetched, after a while none, and move on to after them."""
        # What was fetched before comes without a pause.
        await asyncio.sleep(0)
        fetched = await self._consumer.getmany(self._tp, timeout_ms=self._wait_ms, max_records=records_max)
        self.position = await self._consumer.position(self._tp)
        self._learn_end()
        records: Sequence[Any] = fetched.get(self._tp, [])
        return records

    async def find_end(self) -> int:
        """Return the offset after the last committed record or marker, as a fetch tells it.

        Raises:
            ServiceUnavailable: Kafka stopped answering.
        """
        if self.end:
            with kafka_errors(self._settings, topic=self._tp.topic):
                self._consumer.seek(self._tp, max(self.begin, self.end - 1))
                await self._consumer.getmany(self._tp, timeout_ms=_POLL_MS)
                self._learn_end()
        return self.end

    def _learn_end(self) -> None:
        # The embedded broker tells the base of its last batch as the end; what comes with a fetch is right.
        self.end = max(self.end, self._consumer.last_stable_offset(self._tp) or 0)
