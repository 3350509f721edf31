"""The projector: the changelog of table `files` in, rows of all projections and their watermarks out.

The watermark in PostgreSQL is the authority: a partition starts there, and Kafka's committed offset only mirrors it
for the tools that look at consumer groups. In order, for each batch:

1. decode the changes                           a crash here: nothing has happened
2. in one PostgreSQL transaction: rows of all projections, and the watermarks from where this process knows them to be
   to the end of the batch (compare-and-set)    a crash here: the server rolls it back, the next owner starts before it
                                                not at the expected place: another projector owns the partition, drop it
3. now and then, mirror the position to Kafka   a crash here: the mirror is late, nobody reads it

Where PostgreSQL refuses rows of the batch, 2 has left nothing, and before 3 come:

a. find the records that are refused alone, by attempts that are rolled back, and make sure of the rest
   (`projections/refusals.py`)                  a crash here: nothing has happened
b. send each as a dead letter, wait until delivered
                                                a crash here, or between b and c: the watermark stands before the batch,
                                                so the next owner finds and sends them again; a dead letter is known by
                                                its topic, partition and offset, which are those of the changelog
c. 2 again, without their rows: the watermark passes them
                                                a crash here: all of it was committed and nobody comes back, or nothing
                                                and it is as after b
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Final

from faust.types import TP, StreamT

from agents.bytopic import ByTopic
from agents.letters import LetterProjector
from agents.positions import Mirror, require_projected
from agents.standalone import run_role
from pipeline.app import RoleApp, WebPlace, node_name
from pipeline.errors import RowsRefused
from pipeline.lanes import Batch
from pipeline.logs import get_logger
from pipeline.postgres import PostgresConnectionManager
from pipeline.records import dead_letter
from pipeline.settings import Settings
from pipeline.topics import DEAD_LETTERS, FILES_CHANGELOG, topic_name
from pipeline.transactions import Writer
from pipeline.transport import BatchConsumer
from projections.feed import FeedBatch, decode_feed
from projections.heartbeat import Heartbeat, Pulse, find_pulses
from projections.refusals import Allowance, Refusal, Sifted, sift
from projections.watermarks import PROJECTIONS
from projections.writer import ProjectionWriter

APP_ID: Final = "stampline-projector"

#: The reason in the dead letters of the projector.
_REASON: Final = "projection_refused"

log = get_logger("stampline.projector")


@dataclass(slots=True)
class _Partition:
    consumer: BatchConsumer
    feed_offset: int
    mirror: Mirror
    allowance: Allowance
    #: Sends dead letters; most partitions never have one.
    letters: Writer | None = None


class Projector:
    """The projector's partitions in this process."""

    def __init__(self, settings: Settings, manager: PostgresConnectionManager, *, transactions: bool) -> None:
        self._settings = settings
        self._idempotent = transactions
        owner = node_name()
        self._writer = ProjectionWriter(manager, owner=owner)
        self._heartbeat = Heartbeat(manager, owner, self._find_pulses)
        self._partitions: dict[TP, _Partition] = {}
        # Not in the partitions: one that stopped is opened again and again, and must not earn anything by that.
        self._allowances: dict[TP, Allowance] = {}
        #: Those whose last batch has failed.
        self._failing: set[TP] = set()

    async def open(self, tp: TP, consumer: BatchConsumer) -> int:
        """Start at the watermark; see `pipeline.lanes.Role`."""
        feed_offset = await self._writer.open_partition(tp.partition)
        log_range = await consumer.log_range(tp)
        require_projected(tp, log_range, feed_offset)
        self._partitions[tp] = _Partition(
            consumer, feed_offset, Mirror(consumer, tp), self._allowances.setdefault(tp, Allowance())
        )
        self._heartbeat.start()
        return max(feed_offset, log_range.begin)

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
        changes = decode_feed(batch.records)
        try:
            result = await self._writer.write(batch.tp.partition, partition.feed_offset, changes, batch.next_offset)
        except RowsRefused as exc:
            refused, changes = await self._sift(partition, batch, str(exc))
            await self._send_dead_letters(partition, batch.tp, refused)
            result = await self._writer.write(batch.tp.partition, partition.feed_offset, changes, batch.next_offset)
            partition.allowance.spend(len(refused))
        partition.feed_offset = batch.next_offset
        partition.allowance.earn(len(changes.changes))
        log.info(
            "batch_committed",
            role="projector",
            partition=batch.tp.partition,
            count=len(changes.changes),
            next_input_offset=changes.next_input_offset,
            write_ms=round(result.milliseconds, 2),
            duration_ms=round((time.perf_counter() - started) * 1000, 2),
        )
        await partition.mirror.show(partition.feed_offset)

    async def _sift(self, partition: _Partition, batch: Batch, error: str) -> Sifted:
        """Find out which records are refused, without a trace."""

        async def attempt(piece: FeedBatch) -> str | None:
            # From and to the same places as the batch: what is taken back could as well be all of it.
            return await self._writer.attempt(batch.tp.partition, partition.feed_offset, piece, batch.next_offset)

        return await sift(batch.records, error, attempt, partition.allowance.left)

    async def _send_dead_letters(self, partition: _Partition, tp: TP, refused: Sequence[Refusal]) -> None:
        """Send what is refused as it came; return when it is delivered."""
        if partition.letters is None:
            partition.letters = await self._open_letters(tp)
        now = datetime.now(UTC)
        letters = [
            dead_letter(refusal.record, reason=_REASON, error=refusal.error, attempts=1, now=now) for refusal in refused
        ]
        await partition.letters.write({topic_name(self._settings, DEAD_LETTERS): letters}, {})
        for refusal in refused:
            log.warning(
                "dead_letter_written",
                partition=tp.partition,
                feed_offset=refusal.record.offset,
                reason=_REASON,
                error=refusal.error,
            )

    async def _open_letters(self, tp: TP) -> Writer:
        writer = Writer(
            self._settings,
            partition=tp.partition,
            group=topic_name(self._settings, APP_ID),
            transactional_id=None,
            idempotent=self._idempotent,
            commit_offsets=_commit_nothing,
        )
        await writer.open()
        return writer

    async def close(self, tp: TP) -> None:
        """Let go of a partition; see `pipeline.lanes.Role`."""
        partition = self._partitions.pop(tp, None)
        try:
            if not self._partitions:
                await self._heartbeat.stop()
        finally:
            if partition is not None and partition.letters is not None:
                await partition.letters.aclose()

    async def _find_pulses(self) -> list[Pulse]:
        return await find_pulses(PROJECTIONS, self._partitions, self._failing)

    def retain(self, tps: Iterable[TP]) -> None:
        """Forget what partitions that went to others had refused; see `pipeline.lanes.Role`."""
        kept = set(tps)
        self._failing &= kept
        self._allowances = {tp: allowance for tp, allowance in self._allowances.items() if tp in kept}


async def _commit_nothing(_offsets: Mapping[TP, int]) -> None:
    """Leave the offsets alone: the position of the projector is its watermark."""


def create_app(
    settings: Settings, manager: PostgresConnectionManager, *, transactions: bool, web: WebPlace | None = None
) -> RoleApp:
    """Return the projector's Faust app; the caller opens and closes the connections."""
    projector = Projector(settings, manager, transactions=transactions)
    letters = LetterProjector(manager)
    role = ByTopic({topic_name(settings, FILES_CHANGELOG): projector, topic_name(settings, DEAD_LETTERS): letters})
    app = RoleApp(APP_ID, settings, role, transactions=transactions, web=web)

    @app.agent(app.batches(FILES_CHANGELOG), name="projector")
    async def project_changes(batches: StreamT[Batch]) -> None:
        async for batch in batches:
            batch.start(projector.process)

    @app.agent(app.batches(DEAD_LETTERS), name="dead-letters")
    async def project_letters(batches: StreamT[Batch]) -> None:
        async for batch in batches:
            batch.start(letters.process)

    return app


if __name__ == "__main__":
    run_role("projector")
