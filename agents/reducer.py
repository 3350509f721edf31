"""The reducer: `file-stamps` in, the changelog of table `files` out; the only hop that holds state.

Each batch is one Kafka transaction. In order:

1. fold the stamps over the table            a crash here: nothing has happened
2. in one transaction: changelog, events to send in again, dead letters, input offsets
                                             a crash here: the broker aborts it, the next owner starts before the batch
3. apply the changes to the store            a crash here: the next owner restores them from the changelog; a store on
                                             disk that cannot be written: this partition is opened again

Taking over a partition goes: fence the owner before (start the transactional producer), restore the store up to the
end of the changelog, and only then read the committed offsets.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from typing import Final

from faust.types import TP, StreamT

from agents.positions import committed_position
from agents.retry import DUE_HEADER
from agents.standalone import run_role
from pipeline.app import RoleApp, WebPlace
from pipeline.errors import PositionLost
from pipeline.events import ATTEMPT_HEADER, OUTCOMES, PROGRESS_KEY, Progress, Stamp, decode_stamp, encode_record
from pipeline.lanes import Batch
from pipeline.logs import get_logger
from pipeline.metrics import Metrics
from pipeline.records import Record, dead_letter_of_event
from pipeline.settings import Settings
from pipeline.topics import DEAD_LETTERS, FILE_EVENTS, FILE_STAMPS, FILES_CHANGELOG, RETRY, topic_name
from pipeline.transactions import Writer
from pipeline.transport import BatchConsumer
from tables.changelog import restore
from tables.files import Folded, Rules, backoff_ms, fold
from tables.standby import Standbys
from tables.store import BatchStore, BatchTable, Mark, OpenStore, PartitionStore, open_in_memory, release

APP_ID: Final = "stampline-reducer"
TABLE: Final = "files"

#: The reason in the dead letters of the reducer.
_GAVE_UP: Final = "gave_up"

#: How often a long recovery says how far it is, in s.
_REPORT_SECONDS: Final = 5.0

log = get_logger("stampline.reducer")


@dataclass(slots=True)
class _Partition:
    writer: Writer
    store: PartitionStore


class Reducer:
    """The reducer's partitions in this process."""

    def __init__(self, settings: Settings, *, transactions: bool, metrics: Metrics | None = None) -> None:
        self._settings = settings
        self._transactions = transactions
        self._metrics = metrics or Metrics()
        self._metrics.count_outcomes(dict.fromkeys(OUTCOMES, 0))
        self._metrics.count_dead_letters(_GAVE_UP, 0)
        self._rules = Rules(
            attempts_max=settings.retry_max_attempts,
            backoff_base_ms=settings.retry_backoff_base_ms,
            backoff_cap_ms=settings.retry_backoff_cap_ms,
            dedup_ids_max=settings.dedup_event_ids_max,
            dedup_window_ms=settings.dedup_window_seconds * 1000,
        )
        self._partitions: dict[TP, _Partition] = {}
        self._group = topic_name(settings, APP_ID)
        self._changelog = topic_name(settings, FILES_CHANGELOG)
        #: Copies of partitions that other nodes reduce.
        self.standbys = Standbys(settings, self._changelog)
        #: The table's store; the app gives it its table.
        self.store: BatchStore | None = None

    async def open(self, tp: TP, consumer: BatchConsumer) -> int:
        """Fence, restore, and find the place to go on; see `pipeline.lanes.Role`."""
        assert self.store is not None
        await self.standbys.hand_over(tp.partition)
        writer = Writer(
            self._settings,
            partition=tp.partition,
            group=self._group,
            transactional_id=f"{self._group}-{tp.partition}" if self._transactions else None,
            idempotent=self._transactions,
            commit_offsets=consumer.commit_offsets,
        )
        store = self.store.partition(tp.partition)
        await writer.open()
        self._partitions[tp] = _Partition(writer, store)
        await self._recover(tp, store, consumer)
        log_range = await consumer.log_range(tp)
        position = committed_position(tp, log_range, done="reduced")
        if log_range.committed and store.progress is None:
            raise PositionLost(
                f"{tp.topic} partition {tp.partition} is reduced up to {position}, but the table's changelog is empty"
            )
        return position

    async def _recover(self, tp: TP, store: PartitionStore, consumer: BatchConsumer) -> None:
        """Restore what the store lacks, and say how far that is."""
        started = reported = time.perf_counter()

        def report(records: int, remaining: int) -> None:
            nonlocal reported
            consumer.lanes.report(tp, f"recovering: {remaining} records left")
            if time.perf_counter() - reported >= _REPORT_SECONDS:
                reported = time.perf_counter()
                log.info("partition_recovering", partition=tp.partition, records=records, remaining=remaining)

        records = await restore(self._settings, self._changelog, tp.partition, store, report=report)
        log.info(
            "partition_recovered",
            partition=tp.partition,
            records=records,
            keys=len(store),
            duration_ms=round((time.perf_counter() - started) * 1000),
        )

    async def process(self, batch: Batch) -> None:
        """Fold one batch and commit it."""
        started = time.perf_counter()
        partition = self._partitions[batch.tp]
        store = partition.store
        stamps = [decode_stamp(record.value) for record in batch.records]
        folded = fold(stamps, store.get, store.progress, self._rules)
        pauses_ms = [backoff_ms(stamp.event_id or "", stamp.attempt + 1, self._rules) for stamp in folded.deferred]
        reduced = time.perf_counter()
        progress = encode_record(folded.progress)
        now = datetime.now(UTC)
        next_offsets = await partition.writer.write(
            {
                topic_name(self._settings, RETRY): [
                    _sent_in_again(stamp, pause_ms) for stamp, pause_ms in zip(folded.deferred, pauses_ms, strict=True)
                ],
                topic_name(self._settings, DEAD_LETTERS): [
                    self._given_up(stamp, batch.tp.partition, now) for stamp in folded.gave_up
                ],
                # Last: where there is no transaction, the changelog decides what was taken.
                self._changelog: [
                    *(Record(key, value) for key, value in folded.changes),
                    Record(PROGRESS_KEY, progress),
                ],
            },
            {batch.tp: batch.next_offset},
        )
        committed = time.perf_counter()
        self._count(folded, store.progress, pauses_ms)
        self._metrics.commit_latency_ms.observe((committed - reduced) * 1000)
        self._metrics.count_batch("reducer", records=len(stamps), seconds=committed - started)
        if store.progress is not None and folded.progress.gaps > store.progress.gaps:
            log.error("inputs_missing", partition=batch.tp.partition, recommendation="run `stampline verify`")
        position = next_offsets[self._changelog]
        store.apply(folded.changes, folded.progress, position, mark=Mark(position - 1, progress))
        log.info(
            "batch_committed",
            role="reducer",
            partition=batch.tp.partition,
            count=len(stamps),
            # Of the partition's whole life; strays that grow while nothing is taken mean that the chain is broken.
            repeats=folded.progress.repeats,
            strays=folded.progress.strays,
            next_input_offset=folded.progress.next_input_offset,
            reduce_ms=round((reduced - started) * 1000, 2),
            duration_ms=round((time.perf_counter() - started) * 1000, 2),
        )

    def _count(self, folded: Folded, before: Progress | None, pauses_ms: Iterable[float]) -> None:
        """Count what became of a batch, from how the progress of its partition has changed."""
        outcomes = Counter[str](folded.progress.outcomes)
        if before is not None:
            outcomes.subtract(before.outcomes)
        self._metrics.count_outcomes(outcomes)
        self._metrics.count_dead_letters(_GAVE_UP, len(folded.gave_up))
        for pause_ms in pauses_ms:
            self._metrics.backoff_ms.observe(pause_ms)

    def _given_up(self, stamp: Stamp, partition: int, now: datetime) -> Record:
        assert stamp.uri is not None
        return dead_letter_of_event(
            Record(stamp.uri.encode(), stamp.original),
            topic=topic_name(self._settings, FILE_EVENTS),
            partition=partition,
            offset=stamp.input_offset,
            reason=_GAVE_UP,
            error=f"expected version {stamp.expected_version} did not come in {stamp.attempt} attempts",
            attempts=stamp.attempt + 1,
            now=now,
        )

    async def close(self, tp: TP) -> None:
        """Let go of a partition, but keep its store: if it comes back, only the difference is restored."""
        partition = self._partitions.pop(tp, None)
        try:
            if self.store is not None:
                await release(self.store, tp.partition)
        finally:
            if partition is not None:
                await partition.writer.aclose()

    def retain(self, tps: Iterable[TP]) -> None:
        """Drop the stores of partitions that went to others; see `pipeline.lanes.Role`."""
        if self.store is not None:
            self.store.retain(tp.partition for tp in tps)

    def follow(self, changelogs: Collection[TP]) -> None:
        """Keep copies of partitions that other nodes reduce; see `pipeline.lanes.Follower`."""
        if self.store is not None:
            self.standbys.follow(self.store, {tp.partition for tp in changelogs})

    async def unfollow(self) -> None:
        """Stop that; see `pipeline.lanes.Follower`."""
        await self.standbys.unfollow()

    def copies(self) -> Mapping[int, str]:
        """Tell what the copies are doing; see `pipeline.lanes.Follower`."""
        return self.standbys.status()


def _sent_in_again(stamp: Stamp, pause_ms: float) -> Record:
    """The event for the retry role: its own bytes, which attempt comes next, and when it is due."""
    assert stamp.uri is not None
    due_ms = stamp.stamped_at.timestamp() * 1000 + pause_ms
    headers = ((ATTEMPT_HEADER, b"%d" % (stamp.attempt + 1)), (DUE_HEADER, b"%d" % due_ms))
    return Record(stamp.uri.encode(), stamp.original, headers)


def create_app(
    settings: Settings,
    open_store: OpenStore = open_in_memory,
    *,
    transactions: bool,
    web: WebPlace | None = None,
    metrics: Metrics | None = None,
) -> RoleApp:
    """Return the reducer's Faust app, with its table.

    `open_store` opens the table's partitions, `web` shows them, and what is done is counted in `metrics`.
    """
    reducer = Reducer(settings, transactions=transactions, metrics=metrics)
    app = RoleApp(APP_ID, settings, reducer, transactions=transactions, web=web)
    table = BatchTable(app, name=TABLE, key_type=bytes, value_type=bytes, partitions=settings.kafka_topic_partitions)
    app.tables.add(table)
    table.batch_store.open_partition = partial(open_store, TABLE, topic_name(settings, FILES_CHANGELOG))
    reducer.store = table.batch_store

    @app.agent(app.batches(FILE_STAMPS), name="reducer")
    async def reduce_stamps(batches: StreamT[Batch]) -> None:
        async for batch in batches:
            batch.start(reducer.process)

    return app


if __name__ == "__main__":
    run_role("reducer")
