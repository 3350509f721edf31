"""The heartbeat of a projector: every second it tells PostgreSQL that it is there, and what of the feed is not visible.

Batches tell the same in their own transactions, but only while something comes. What is told here is what the view
`projection_lag` makes its answer of: a partition is caught up when nothing of its feed is missing, which no offset says
by itself, for the last offset of a transactional log is a marker that no consumer sees.

A partition that nobody may believe in is left out, and its heartbeat grows old: see `find_pulse`.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Protocol

from faust.types import TP

from pipeline.errors import StamplineError
from pipeline.logs import get_logger
from pipeline.postgres import PostgresConnectionManager
from pipeline.transport import BatchConsumer, Reach
from projections.queries import query

#: A tenth of what `stampline.stalled_after` in PostgreSQL allows: one that comes late makes nobody look dead.
HEARTBEAT_SECONDS: Final = 1.0

#: A fetch is answered every tenth of a second, also where nothing comes. Older than this, it tells nothing any more.
_ANSWER_SECONDS_MAX: Final = 5.0

log = get_logger("stampline.heartbeat")


@dataclass(frozen=True, slots=True)
class Pulse:
    """What is told of one partition: its projections stand at `feed_offset`, and its feed ends at `feed_end`.

    `caught_up` is whether all of the feed is visible; `feed_end` is then `feed_offset`.
    """

    projections: Sequence[str]
    partition: int
    feed_offset: int
    feed_end: int
    caught_up: bool


def find_pulse(
    projections: Sequence[str], partition: int, feed_offset: int, reach: Reach | None, *, failing: bool
) -> Pulse | None:
    """Return what is to be told of a partition; None where it must not look alive.

    It must not where Kafka does not answer, so that nobody knows what is missing, and where its last batch has failed:
    opening it again and again is no life.

    Args:
        projections: the names of those that are made of this feed.
        partition: its number.
        feed_offset: up to where it is projected, looked at after `reach`.
        reach: how far it has been fetched.
        failing: whether the last batch that was tried has failed.
    """
    if reach is None:
        return None
    idle = reach.taken is None or reach.taken <= feed_offset
    if idle and reach.position >= reach.end:
        told = reach.age_seconds <= _ANSWER_SECONDS_MAX
        return Pulse(projections, partition, feed_offset, feed_offset, caught_up=True) if told else None
    if failing or (idle and reach.age_seconds > _ANSWER_SECONDS_MAX):
        return None
    feed_end = max(reach.end, reach.taken or 0, feed_offset)
    return Pulse(projections, partition, feed_offset, feed_end, caught_up=False)


class Standing(Protocol):
    """What is needed of an open partition."""

    @property
    def consumer(self) -> BatchConsumer:
        """The consumer that fetches it."""

    @property
    def feed_offset(self) -> int:
        """Up to where it is projected."""


async def find_pulses(projections: Sequence[str], partitions: Mapping[TP, Standing], failing: set[TP]) -> list[Pulse]:
    """Look how far each open partition has come, and return what is to be told.

    Args:
        projections: the names of those that are made of this feed.
        partitions: the open partitions; some may be closed while this looks.
        failing: those whose last batch has failed; who has caught up is taken out.
    """
    looked = dict(partitions)
    reaches: dict[TP, Reach] = {}
    for consumer in {standing.consumer for standing in looked.values()}:
        reaches |= await consumer.reaches(looked)
    pulses = []
    for tp, standing in looked.items():
        if partitions.get(tp) is not standing:
            continue  # It was closed meanwhile.
        pulse = find_pulse(projections, tp.partition, standing.feed_offset, reaches.get(tp), failing=tp in failing)
        if pulse is not None:
            pulses.append(pulse)
            if pulse.caught_up:
                failing.discard(tp)
    return pulses


class Heartbeat:
    """Writes the pulses of all partitions of a role, every `HEARTBEAT_SECONDS`, in one statement.

    Args:
        manager: the connections; the caller opens and closes them.
        owner: the name of this process in the watermarks; what another one owns is left alone.
        look: finds the pulses.
    """

    def __init__(
        self, manager: PostgresConnectionManager, owner: str, look: Callable[[], Awaitable[Sequence[Pulse]]]
    ) -> None:
        self._manager = manager
        self._owner = owner
        self._look = look
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begin. Calling it again does nothing."""
        if self._task is None:
            self._task = asyncio.create_task(self._beat_on())

    async def stop(self) -> None:
        """End, also in the middle of a statement. Calling it again does nothing."""
        task, self._task = self._task, None
        if task is not None:
            task.cancel()
            await asyncio.wait([task])

    async def _beat_on(self) -> None:
        while True:
            await asyncio.sleep(HEARTBEAT_SECONDS)
            try:
                await self.beat()
            except StamplineError as exc:
                # The batches tell of PostgreSQL, and who looks at the heartbeat sees it grow old.
                log.debug("heartbeat_not_written", error=str(exc))
            except Exception:
                log.exception("heartbeat_not_written")

    async def beat(self) -> None:
        """Look and write, once.

        Raises:
            ServiceUnavailable, BatchAborted, SettingsError: as `PostgresConnectionManager.connection`.
        """
        looked_at = time.monotonic()
        pulses = await self._look()
        if not pulses:
            return
        rows = [(name, pulse) for pulse in pulses for name in pulse.projections]
        async with self._manager.connection() as connection:
            await connection.execute(
                query("beat_watermarks"),
                self._owner,
                [name for name, _ in rows],
                [pulse.partition for _, pulse in rows],
                [pulse.feed_offset for _, pulse in rows],
                [pulse.feed_end for _, pulse in rows],
                [pulse.caught_up for _, pulse in rows],
                time.monotonic() - looked_at,
            )
