"""The dead letters' half of the projector: `file-events-dlq` in, rows of `dead_letters` and a watermark out.

As for the changelog, the watermark in PostgreSQL is the authority, and rows and watermark are one transaction. In
order, for each batch:

1. in one PostgreSQL transaction: letters, marks, and the watermark from where this process knows it to be to the end of
   the batch (compare-and-set)                  a crash here: the server rolls it back, the next owner starts before it
2. now and then, mirror the position to Kafka   a crash here: the mirror is late, nobody reads it

Nothing is refused here: there is no place that a dead letter of a dead letter could go to.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass

from faust.types import TP

from agents.positions import Mirror, require_projected
from pipeline.app import node_name
from pipeline.lanes import Batch
from pipeline.logs import get_logger
from pipeline.postgres import PostgresConnectionManager
from pipeline.transport import BatchConsumer
from projections import dead_letters
from projections.heartbeat import Heartbeat, Pulse, find_pulses
from projections.letters_writer import LettersWriter

log = get_logger("stampline.projector")


@dataclass(slots=True)
class _Partition:
    consumer: BatchConsumer
    feed_offset: int
    mirror: Mirror


class LetterProjector:
    """The partitions of dead letters in this process."""

    def __init__(self, manager: PostgresConnectionManager) -> None:
        self._writer = LettersWriter(manager, owner=node_name())
        self._heartbeat = Heartbeat(manager, node_name(), self._find_pulses)
        self._partitions: dict[TP, _Partition] = {}
        #: Those whose last batch has failed.
        self._failing: set[TP] = set()

    async def open(self, tp: TP, consumer: BatchConsumer) -> int:
        """Start at the watermark; see `pipeline.lanes.Role`."""
        offset = await self._writer.open_partition(tp.partition)
        log_range = await consumer.log_range(tp)
        require_projected(tp, log_range, offset)
        if 0 < offset < log_range.begin:
            # Nobody can bring them back, and new ones are waiting.
            log.error(
                "dead_letters_lost",
                topic=tp.topic,
                partition=tp.partition,
                first_offset=offset,
                count=log_range.begin - offset,
                recommendation="retention was shorter than the projector was away: raise retention.ms",
            )
        self._partitions[tp] = _Partition(consumer, offset, Mirror(consumer, tp))
        self._heartbeat.start()
        return max(offset, log_range.begin)

    async def process(self, batch: Batch) -> None:
        """Project one batch."""
        try:
            await self._project(batch)
        except BaseException:
            self._failing.add(batch.tp)
            raise
        self._failing.discard(batch.tp)

    async def _project(self, batch: Batch) -> None:
        started = time.perf_counter()
        partition = self._partitions[batch.tp]
        rows = await self._writer.write(batch.tp.partition, partition.feed_offset, batch.records, batch.next_offset)
        partition.feed_offset = batch.next_offset
        log.info(
            "dead_letters_projected",
            partition=batch.tp.partition,
            count=rows,
            next_offset=batch.next_offset,
            duration_ms=round((time.perf_counter() - started) * 1000, 2),
        )
        await partition.mirror.show(partition.feed_offset)

    async def close(self, tp: TP) -> None:
        """Let go of a partition; see `pipeline.lanes.Role`."""
        self._partitions.pop(tp, None)
        if not self._partitions:
            await self._heartbeat.stop()

    def retain(self, tps: Iterable[TP]) -> None:
        """Forget which partitions were failing that went to others; see `pipeline.lanes.Role`."""
        self._failing &= set(tps)

    async def _find_pulses(self) -> list[Pulse]:
        return await find_pulses((dead_letters.NAME,), self._partitions, self._failing)
