"""The retry role: `file-events-retry` in, the same events into `file-events` again once they are due.

The reducer writes an event here whose expected version has not come yet, with the number of the attempt and when it is
due. It goes to the same partition of `file-events` as before, as an input of its own. In order, for each batch:

1. cut the batch into portions (`plan`), each due later than the one before it
2. wait until a portion is due      a crash here, or a revoke: nothing has happened to it
3. in one transaction: its events, dead letters of what is no event, its input offsets
                                    a crash here: the broker aborts it, the next owner starts before the portion

Taking over a partition goes as in the reducer: fence the owner before, and only then read the committed offsets.

On the embedded broker, which has no transactions, a crash between sending and committing sends a portion again. That
changes no file: a repeat of what was applied is a duplicate by its event id, and where that is forgotten already its
expected version is in the past, for a version comes only once. It is an input like a producer's own retry.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Final, NamedTuple

from faust.types import TP, StreamT

from agents.positions import after_markers, committed_position
from agents.standalone import run_role
from pipeline.app import RoleApp, WebPlace
from pipeline.errors import InputRejected
from pipeline.events import decode_event
from pipeline.lanes import Batch
from pipeline.logs import get_logger
from pipeline.metrics import Metrics
from pipeline.records import Record, dead_letter
from pipeline.settings import Settings
from pipeline.topics import DEAD_LETTERS, FILE_EVENTS, RETRY, topic_name
from pipeline.transactions import Writer
from pipeline.transport import BatchConsumer

APP_ID: Final = "stampline-retry"

#: Header of `file-events-retry`: when the event is to be sent in again, in ms since 1970.
DUE_HEADER: Final = "stampline-due-ms"

#: The reason in the dead letters of this role.
_REASON: Final = "invalid_retry"

#: A portion spans at most this part of the longest pause: a batch is never more than five transactions.
_SPANS: Final = 4

log = get_logger("stampline.retry")


class Portion(NamedTuple):
    """Records that are sent together, and when: so many ms after the batch came."""

    pause_ms: float
    records: list[Any]


def plan(records: Sequence[Any], *, now_ms: float, cap_ms: float) -> list[Portion]:
    """Cut a batch into portions, in order, none of whose records is sent before it is due.

    Order within the partition is kept, so a record also waits for those before it. What is due at once does not wait
    for the rest. A due time further away than the cap is wrong, for example of a broken clock, and is taken as the cap:
    the whole batch is sent by then.

    Args:
        records: the batch as aiokafka consumed it; one that does not say when it is due is due now.
        now_ms: now, in ms since 1970.
        cap_ms: longest pause.
    """
    portions: list[Portion] = []
    pause_ms = latest_ms = 0.0
    for record in records:
        pause_ms = max(pause_ms, min(_due_ms(record) - now_ms, cap_ms))
        if portions and pause_ms <= latest_ms:
            portions[-1].records.append(record)
            portions[-1] = portions[-1]._replace(pause_ms=pause_ms)
        else:
            portions.append(Portion(pause_ms, [record]))
            latest_ms = pause_ms + cap_ms / _SPANS if pause_ms > 0 else 0.0
    return portions


def _due_ms(record: Any) -> int:
    for name, value in record.headers:
        # Fifteen digits are the year 33658; Python refuses to read a number of thousands of them.
        if name == DUE_HEADER and value and value.isdigit():
            return int(value[:15])
    return 0


def sift(records: Iterable[Any], *, now: datetime) -> tuple[list[Record], list[Record]]:
    """Return the events to send in again, and the dead letters of what somebody else has put here."""
    events: list[Record] = []
    letters: list[Record] = []
    for record in records:
        try:
            decode_event(record.key, record.value)
        except InputRejected as exc:
            letters.append(dead_letter(record, reason=_REASON, error=str(exc), attempts=1, now=now))
        else:
            kept = tuple((name, value) for name, value in record.headers if name != DUE_HEADER)
            events.append(Record(record.key, record.value, kept))
    return events, letters


@dataclass(frozen=True, slots=True)
class _Partition:
    writer: Writer
    consumer: BatchConsumer


class Retry:
    """The retry role's partitions in this process."""

    def __init__(self, settings: Settings, *, transactions: bool, metrics: Metrics | None = None) -> None:
        self._settings = settings
        self._transactions = transactions
        self._metrics = metrics or Metrics()
        self._metrics.count_dead_letters(_REASON, 0)
        self._partitions: dict[TP, _Partition] = {}
        self._group = topic_name(settings, APP_ID)
        self._events = topic_name(settings, FILE_EVENTS)
        self._letters = topic_name(settings, DEAD_LETTERS)

    async def open(self, tp: TP, consumer: BatchConsumer) -> int:
        """Fence, and find the place to go on; see `pipeline.lanes.Role`."""
        writer = Writer(
            self._settings,
            partition=tp.partition,
            group=self._group,
            transactional_id=f"{self._group}-{tp.partition}" if self._transactions else None,
            idempotent=self._transactions,
            commit_offsets=consumer.commit_offsets,
        )
        await writer.open()
        self._partitions[tp] = _Partition(writer, consumer)
        return committed_position(tp, await consumer.log_range(tp), done="sent in again")

    async def process(self, batch: Batch) -> None:
        """Send the events of one batch in again, each when it is due."""
        started = time.monotonic()
        cap_ms = self._settings.retry_backoff_cap_ms
        for pause_ms, records in plan(batch.records, now_ms=time.time() * 1000, cap_ms=cap_ms):
            # By another clock than the one that the due times are of: it may be set back meanwhile.
            await asyncio.sleep(max(0.0, started + pause_ms / 1000 - time.monotonic()))
            await self._send(batch.tp, records)

    async def _send(self, tp: TP, records: Sequence[Any]) -> None:
        started = time.perf_counter()
        writer, consumer = self._partitions[tp].writer, self._partitions[tp].consumer
        events, letters = sift(records, now=datetime.now(UTC))
        position = await after_markers(consumer, tp, records[-1].offset + 1)
        await writer.write({self._letters: letters, self._events: events}, {tp: position})
        seconds = time.perf_counter() - started
        self._metrics.count_batch("retry", records=len(records), seconds=seconds)
        self._metrics.count_dead_letters(_REASON, len(letters))
        log.info(
            "batch_committed",
            role="retry",
            partition=tp.partition,
            count=len(records),
            dead_letters=len(letters),
            duration_ms=round(seconds * 1000, 2),
        )

    async def close(self, tp: TP) -> None:
        """Let go of a partition; see `pipeline.lanes.Role`."""
        partition = self._partitions.pop(tp, None)
        if partition is not None:
            await partition.writer.aclose()

    def retain(self, _tps: Iterable[TP]) -> None:
        """Nothing is kept of a closed partition."""


def create_app(
    settings: Settings, *, transactions: bool, web: WebPlace | None = None, metrics: Metrics | None = None
) -> RoleApp:
    """Return the retry role's Faust app, which counts in `metrics`."""
    retry = Retry(settings, transactions=transactions, metrics=metrics)
    app = RoleApp(APP_ID, settings, retry, transactions=transactions, web=web)

    @app.agent(app.batches(RETRY), name="retry")
    async def send_in_again(batches: StreamT[Batch]) -> None:
        async for batch in batches:
            batch.start(retry.process)

    return app


if __name__ == "__main__":
    run_role("retry")
