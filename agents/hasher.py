"""The hasher: `file-events` in, one stamp for each event out, the unusable ones to the dead letters too.

It holds no state but the offset of the last record it read of each partition. It takes no transaction: what it
sends is delivered before its offset is committed, so a crash between the two repeats stamps, and the chain of input
offsets lets the reducer drop the repeats. In order, for each batch:

1. decode, hash                 a crash here: nothing has happened
2. send stamps and dead letters, wait until delivered
                                a crash here: they are sent again, the reducer and the dead letters know the offset
3. commit the input offset      a crash here: the next hasher goes on after the batch
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Final

from faust.types import TP, StreamT

from agents.standalone import run_role
from pipeline.app import RoleApp, WebPlace
from pipeline.errors import PositionLost
from pipeline.hashing import FileHasher
from pipeline.lanes import Batch
from pipeline.logs import get_logger
from pipeline.settings import Settings
from pipeline.stamps import read_batch, stamp_batch
from pipeline.topics import DEAD_LETTERS, FILE_EVENTS, FILE_STAMPS, topic_name
from pipeline.transactions import Writer
from pipeline.transport import BatchConsumer

APP_ID: Final = "stampline-hasher"

log = get_logger("metadata_stamping.hash_generator")


@dataclass(slots=True)
class _Partition:
    writer: Writer
    previous_offset: int | None


class Hasher:
    """The hasher's partitions in this process."""

    def __init__(self, settings: Settings, file_hasher: FileHasher, *, transactions: bool) -> None:
        self._settings = settings
        self._idempotent = transactions
        self._hasher = file_hasher
        self._partitions: dict[TP, _Partition] = {}
        self._stamps = topic_name(settings, FILE_STAMPS)
        self._letters = topic_name(settings, DEAD_LETTERS)

    async def open(self, tp: TP, consumer: BatchConsumer) -> int:
        """Find the place to go on; see `pipeline.lanes.Role`."""
        log_range = await consumer.log_range(tp)
        position = log_range.committed
        previous_offset = position - 1 if position else None
        if position is None:
            position = log_range.begin
        elif position < log_range.begin:
            # Nobody can bring these inputs back; the new chain makes the reducer count the gap.
            log.error(
                "inputs_lost",
                topic=tp.topic,
                partition=tp.partition,
                first_offset=position,
                count=log_range.begin - position,
                recommendation="retention was shorter than the hasher was away: raise retention.ms",
            )
            position, previous_offset = log_range.begin, None
        elif log_range.ends_before(position):
            raise PositionLost(
                f"{tp.topic} partition {tp.partition} ends at {log_range.end}, but this group has read up to "
                f"{position}: it was made anew. Start with another KAFKA_TOPIC_PREFIX and database, or restore it"
            )
        writer = Writer(
            self._settings,
            partition=tp.partition,
            group=topic_name(self._settings, APP_ID),
            transactional_id=None,
            idempotent=self._idempotent,
            commit_offsets=consumer.commit_offsets,
        )
        await writer.open()
        self._partitions[tp] = _Partition(writer, previous_offset)
        return position

    async def process(self, batch: Batch) -> None:
        """Hash one batch and send its stamps."""
        started = time.perf_counter()
        partition = self._partitions[batch.tp]
        read = read_batch(batch.records, inline_max_bytes=self._settings.content_inline_max_bytes)
        fetched = await self._hasher.digest([item.event.uri for item in read if item.wanted and item.event])
        stamps, letters = stamp_batch(read, fetched, previous_offset=partition.previous_offset, now=datetime.now(UTC))
        hashed = time.perf_counter()
        await partition.writer.write({self._letters: letters, self._stamps: stamps}, {batch.tp: batch.next_offset})
        partition.previous_offset = batch.records[-1].offset
        log.info(
            "hash_generated",
            partition=batch.tp.partition,
            count=len(stamps),
            rejected=len(letters),
            execution_time_ms=round((hashed - started) * 1000, 2),
            duration_ms=round((time.perf_counter() - started) * 1000, 2),
        )

    async def close(self, tp: TP) -> None:
        """Let go of a partition; see `pipeline.lanes.Role`."""
        partition = self._partitions.pop(tp, None)
        if partition is not None:
            await partition.writer.aclose()

    def retain(self, _tps: Iterable[TP]) -> None:
        """Nothing is kept of a closed partition."""


def create_app(
    settings: Settings, file_hasher: FileHasher, *, transactions: bool, web: WebPlace | None = None
) -> RoleApp:
    """Return the hasher's Faust app; the caller closes `file_hasher`."""
    hasher = Hasher(settings, file_hasher, transactions=transactions)
    app = RoleApp(APP_ID, settings, hasher, transactions=transactions, web=web)

    @app.agent(app.batches(FILE_EVENTS), name="hasher")
    async def hash_events(batches: StreamT[Batch]) -> None:
        async for batch in batches:
            batch.start(hasher.process)

    return app


if __name__ == "__main__":
    run_role("hasher")
