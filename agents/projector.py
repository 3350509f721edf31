"""The projector: the changelog of table `files` in, rows of all projections and their watermarks out.

The watermark in PostgreSQL is the authority: a partition starts there, and Kafka's committed offset only mirrors it
for the tools that look at consumer groups. In order, for each batch:

1. decode the changes                           a crash here: nothing has happened
2. in one PostgreSQL transaction: rows of all projections, and the watermarks from where this process knows them to be
   to the end of the batch (compare-and-set)    a crash here: the server rolls it back, the next owner starts before it
                                                not at the expected place: another projector owns the partition, drop it
3. now and then, mirror the position to Kafka   a crash here: the mirror is late, nobody reads it
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

from faust.types import TP, StreamT

from agents.standalone import run_role
from pipeline.app import RoleApp
from pipeline.errors import PositionLost, StamplineError
from pipeline.lanes import Batch
from pipeline.logs import get_logger
from pipeline.postgres import PostgresConnectionManager
from pipeline.settings import Settings
from pipeline.topics import FILES_CHANGELOG
from pipeline.transport import BatchConsumer
from projections.feed import decode_feed
from projections.writer import ProjectionWriter

APP_ID: Final = "stampline-projector"

#: How often the position is mirrored to Kafka, in s.
_MIRROR_SECONDS: Final = 1.0

log = get_logger("stampline.projector")


@dataclass(slots=True)
class _Partition:
    consumer: BatchConsumer
    feed_offset: int
    mirrored_at: float = 0.0


class Projector:
    """The projector's partitions in this process."""

    def __init__(self, manager: PostgresConnectionManager) -> None:
        self._writer = ProjectionWriter(manager, owner=f"{socket.gethostname()}-{os.getpid()}")
        self._partitions: dict[TP, _Partition] = {}

    async def open(self, tp: TP, consumer: BatchConsumer) -> int:
        """Start at the watermark; see `pipeline.lanes.Role`."""
        feed_offset = await self._writer.open_partition(tp.partition)
        log_range = await consumer.log_range(tp)
        if log_range.ends_before(feed_offset):
            raise PositionLost(
                f"{tp.topic} partition {tp.partition} ends at {log_range.end}, but is projected up to {feed_offset}: "
                "the topic was made anew, or this is the database of another broker. "
                "Start with an empty database (POSTGRES_DB), or with the broker that belongs to it"
            )
        self._partitions[tp] = _Partition(consumer, feed_offset)
        return max(feed_offset, log_range.begin)

    async def process(self, batch: Batch) -> None:
        """Project one batch."""
        started = time.perf_counter()
        partition = self._partitions[batch.tp]
        changes = decode_feed(batch.records)
        result = await self._writer.write(batch.tp.partition, partition.feed_offset, changes, batch.next_offset)
        partition.feed_offset = batch.next_offset
        log.info(
            "batch_committed",
            role="projector",
            partition=batch.tp.partition,
            count=len(changes.changes),
            next_input_offset=changes.next_input_offset,
            write_ms=round(result.milliseconds, 2),
            duration_ms=round((time.perf_counter() - started) * 1000, 2),
        )
        if started - partition.mirrored_at > _MIRROR_SECONDS:
            partition.mirrored_at = started
            await _mirror(partition, batch.tp)

    async def close(self, tp: TP) -> None:
        """Let go of a partition; see `pipeline.lanes.Role`."""
        self._partitions.pop(tp, None)

    def retain(self, _tps: Iterable[TP]) -> None:
        """Nothing is kept of a closed partition."""


async def _mirror(partition: _Partition, tp: TP) -> None:
    try:
        await partition.consumer.commit_offsets({tp: partition.feed_offset})
    except StamplineError as exc:
        log.debug("position_not_mirrored", partition=tp.partition, error=str(exc))


def create_app(settings: Settings, manager: PostgresConnectionManager, *, transactions: bool) -> RoleApp:
    """Return the projector's Faust app; the caller opens and closes the connections."""
    projector = Projector(manager)
    app = RoleApp(APP_ID, settings, projector, transactions=transactions)

    @app.agent(app.batches(FILES_CHANGELOG), name="projector")
    async def project_changes(batches: StreamT[Batch]) -> None:
        async for batch in batches:
            batch.start(projector.process)

    return app


if __name__ == "__main__":
    run_role("projector")
