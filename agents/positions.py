"""Positions in Kafka: where a partition goes on after what its group has committed, and mirrors of other positions."""

from __future__ import annotations

import time
from typing import Final

from faust.types import TP

from pipeline.errors import PositionLost, StamplineError
from pipeline.logs import get_logger
from pipeline.transport import BatchConsumer, LogRange

#: How often a position is mirrored, in s.
_MIRROR_SECONDS: Final = 1.0

log = get_logger("stampline.positions")


class Mirror:
    """Commits the position of a partition now and then, for the tools that look at consumer groups.

    Nobody of ours reads it: the authority is elsewhere, and what cannot be committed is no matter.
    """

    def __init__(self, consumer: BatchConsumer, tp: TP) -> None:
        self._consumer = consumer
        self._tp = tp
        self._shown_at = 0.0

    async def show(self, offset: int) -> None:
        """Commit this position, unless another one was committed a moment ago."""
        now = time.monotonic()
        if now - self._shown_at <= _MIRROR_SECONDS:
            return
        self._shown_at = now
        try:
            await self._consumer.commit_offsets({self._tp: offset})
        except StamplineError as exc:
            log.debug("position_not_mirrored", partition=self._tp.partition, error=str(exc))


def committed_position(tp: TP, log_range: LogRange, *, done: str) -> int:
    """Return the offset to go on at: the committed one, or the log's first where nothing was committed yet.

    Args:
        tp: the partition.
        log_range: what its log holds, and what was committed.
        done: what the role does with records, in the past tense, for the messages.

    Raises:
        PositionLost: retention has taken records that were not done, or the log is another one by the same name.
    """
    committed = log_range.committed
    place = f"{tp.topic} partition {tp.partition}"
    if committed is None:
        return log_range.begin
    if committed < log_range.begin:
        raise PositionLost(
            f"{place}: offsets {committed} to {log_range.begin - 1} are gone by retention and were not {done}"
        )
    if log_range.ends_before(committed):
        raise PositionLost(f"{place} ends at {log_range.end}, but is {done} up to {committed}: it was made anew")
    return committed


def require_projected(tp: TP, log_range: LogRange, offset: int) -> None:
    """Make sure that a log reaches up to where it is projected.

    Raises:
        PositionLost: it ends before; the message says what to do.
    """
    if log_range.ends_before(offset):
        raise PositionLost(
            f"{tp.topic} partition {tp.partition} ends at {log_range.end}, but is projected up to {offset}: "
            "the topic was made anew, or this is the database of another broker. "
            "Start with an empty database (POSTGRES_DB), or with the broker that belongs to it"
        )


async def after_markers(consumer: BatchConsumer, tp: TP, next_offset: int) -> int:
    """Return the position to commit after records up to `next_offset`: past the markers that follow, if no record does.

    Behind the last record of a transaction stands its marker, which no consumer sees. Where a partition is idle for
    longer than its retention, the log then begins after the marker, and a position before it would look like a loss.
    """
    reach = (await consumer.reaches([tp])).get(tp)
    return reach.position if reach is not None and reach.taken == next_offset else next_offset
