"""Read your own write: wait until an event is visible in PostgreSQL, and hear what became of it.

All waits of a process share one connection, and one look at the watermarks, as often as somebody waits for something
that is due. What became of an event is told by `wait_for` in PostgreSQL, so that everybody hears the same.

It stands below the projections and asks nothing but what analysts may ask, in statements of its own: a producer needs
no more than membership in `stampline_reader`.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from types import TracebackType
from typing import Any, Final, Literal, Self, TypeAlias

from pipeline.client import Position
from pipeline.errors import ServiceUnavailable, StamplineError
from pipeline.postgres import Connection, PostgresConnectionManager
from pipeline.settings import Settings
from pipeline.topics import FILE_EVENTS, topic_name

Verdict: TypeAlias = Literal["reached", "rejected", "stalled", "timeout"]

#: The pause between two looks at the watermarks, in s: short while answers come, growing while they do not.
_PAUSE_SECONDS_MIN: Final = 0.01
_PAUSE_SECONDS_MAX: Final = 0.1
_PAUSE_GROWTH: Final = 1.2
#: The pause after a failure. The breaker leaves PostgreSQL alone for as long, lest a wait ends before it looks again.
_RETRY_SECONDS: Final = 0.25
#: Without an answer for so long, a wait that is over does not say that the event is not visible: nobody knows.
_SILENCE_SECONDS_MAX: Final = 2.0
#: A dead letter takes a road of its own: so long an answer waits for the reason in it.
_LETTER_SECONDS: Final = 2.0

_MARKS: Final = """
SELECT mark.partition, min(mark.input_offset) AS input_offset, min(mark.heartbeat_at) AS heartbeat_at,
       bool_or(lag.status = 'stalled') AS stalled
FROM projection_watermarks AS mark
JOIN projection_lag AS lag USING (projection, partition)
WHERE mark.partition = ANY ($1::integer[]) AND mark.input_offset IS NOT NULL
GROUP BY mark.partition
"""
_VERDICTS: Final = """
SELECT token, wait_for(token, interval '0') AS verdict FROM unnest($1::text[]) AS token
"""
# An event that was sent in again became what its latest input became: as in `stampline.answer`.
_REASONS: Final = """
SELECT asked.partition, asked."offset", coalesce(latest.outcome, input.outcome) AS outcome,
       coalesce(latest.reason, input.reason) AS reason, letter.reason AS letter_reason, letter.error AS letter_error
FROM unnest($1::integer[], $2::bigint[]) AS asked (partition, "offset")
LEFT JOIN file_history AS input
    ON input.input_partition = asked.partition AND input.input_offset = asked."offset"
LEFT JOIN LATERAL (
    SELECT again.outcome, again.reason
    FROM file_history AS again
    WHERE input.outcome = 'deferred' AND again.outcome <> 'deferred'
      AND again.uri = input.uri AND again.event_id = input.event_id
      AND again.input_partition = asked.partition AND again.input_offset > asked."offset"
    ORDER BY again.input_offset
    LIMIT 1
) AS latest ON true
LEFT JOIN dead_letters AS letter
    ON letter.topic = ANY ($3::text[]) AND letter.partition = asked.partition AND letter."offset" = asked."offset"
"""


@dataclass(frozen=True, slots=True)
class Answer:
    """What became of an event.

    `reached`: it is visible. `rejected`: it never will be, `reason` says why where that is known. `stalled`: nobody
    projects its `partition`, the last sign of life was at `since`. `timeout`: it was not visible in time.
    """

    verdict: Verdict
    reason: str | None
    partition: int
    since: datetime | None = None


@dataclass(slots=True, eq=False)
class _Wait:
    position: Position
    began_at: float
    answer: asyncio.Future[Answer]
    #: Since when it is known to be rejected, for a reason that is not known yet.
    rejected_at: float | None = None


class Waiter:
    """Waits for any number of events at once; an async context manager.

    It connects with the first wait, and asks nothing while nobody waits.

    Args:
        settings: where PostgreSQL is.
    """

    def __init__(self, settings: Settings) -> None:
        # One connection: a pool that is as large as its use would count as exhausted.
        ours = {
            "database_pool_min_size": 1,
            "database_pool_max_size": 2,
            "postgres_pool_exhaustion_threshold": 1.0,
            "db_circuit_breaker_recovery_timeout": _RETRY_SECONDS,
        }
        self._manager = PostgresConnectionManager(settings.model_copy(update=ours))
        self._topics = [FILE_EVENTS, topic_name(settings, FILE_EVENTS)]
        self._place = settings.postgres_place
        self._waits: set[_Wait] = set()
        self._arrived = asyncio.Event()
        self._poller: asyncio.Task[None] | None = None
        #: What the last look failed with, and when the last one succeeded.
        self._fault: StamplineError | None = None
        self._looked_at = 0.0
        self._closed = False

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Disconnect; whoever still waits gets a `ServiceUnavailable`. May be called twice."""
        self._closed = True
        self._fail(self._waits, ServiceUnavailable("the waiter was closed"))
        poller, self._poller = self._poller, None
        if poller is not None:
            poller.cancel()
            await asyncio.wait([poller])
        await self._manager.aclose()

    async def wait(self, token: str, timeout_seconds: float) -> Answer:
        """Wait until the event of a token is visible, or it is known that it will not be.

        Args:
            token: what the producer got for the event.
            timeout_seconds: the longest wait, more than 0.

        Raises:
            InvalidToken: it is no token.
            ServiceUnavailable: PostgreSQL did not answer, though it was asked again and again until the time was up.
            SettingsError: PostgreSQL does not let us in, or lacks the tables.
        """
        position = Position.parse(token)
        assert timeout_seconds > 0
        assert not self._closed, "a waiter that was closed is not used again"
        wait = _Wait(position, time.monotonic(), asyncio.get_running_loop().create_future())
        self._waits.add(wait)
        self._arrived.set()
        if self._poller is None or self._poller.done():
            self._poller = asyncio.create_task(self._poll())
        try:
            async with asyncio.timeout(timeout_seconds):
                return await wait.answer
        except TimeoutError:
            return self._give_up(wait)
        finally:
            self._waits.discard(wait)

    def _give_up(self, wait: _Wait) -> Answer:
        """Return what is known of an event when its time is up."""
        if wait.rejected_at is not None:
            return Answer("rejected", None, wait.position.partition)
        if self._fault is not None:
            raise ServiceUnavailable(str(self._fault)) from self._fault
        silence_seconds = time.monotonic() - max(self._looked_at, wait.began_at)
        if self._looked_at < wait.began_at or silence_seconds > _SILENCE_SECONDS_MAX:
            raise ServiceUnavailable(f"PostgreSQL at {self._place} did not answer within {silence_seconds:.1f} s")
        return Answer("timeout", None, wait.position.partition)

    async def _poll(self) -> None:
        """Look again and again while somebody waits."""
        try:
            while self._waits:
                try:
                    await self._manager.open()
                    async with self._manager.connection() as connection:
                        await self._watch(connection)
                except StamplineError as exc:
                    if not exc.retriable:
                        raise
                    self._fault = exc
                    await asyncio.sleep(_RETRY_SECONDS)
        except Exception as exc:  # noqa: BLE001 - those who wait get it
            self._fail(self._waits, exc)

    async def _watch(self, connection: Connection) -> None:
        pause = _PAUSE_SECONDS_MIN
        while self._waits:
            arrived = self._arrived.is_set()
            self._arrived.clear()
            answered = await self._look(connection)
            self._fault, self._looked_at = None, time.monotonic()
            pause = _PAUSE_SECONDS_MIN if answered or arrived else min(pause * _PAUSE_GROWTH, _PAUSE_SECONDS_MAX)
            await asyncio.sleep(_PAUSE_SECONDS_MIN)
            if pause > _PAUSE_SECONDS_MIN:
                with suppress(TimeoutError):
                    async with asyncio.timeout(pause - _PAUSE_SECONDS_MIN):
                        await self._arrived.wait()

    async def _look(self, connection: Connection) -> bool:
        """Look at the watermarks, and answer the waits that they let be answered; return whether there were any."""
        waits = list(self._waits)
        rows = await connection.fetch(_MARKS, sorted({wait.position.partition for wait in waits}))
        marks = {row["partition"]: dict(row) for row in rows}
        due = [wait for wait in waits if _is_due(wait, marks)]
        if not due:
            return False
        tokens = sorted({wait.position.token for wait in due})
        verdicts = {row["token"]: row["verdict"] for row in await connection.fetch(_VERDICTS, tokens)}
        rejected = {wait.position for wait in due if verdicts[wait.position.token] == "rejected"}
        reasons = await self._find_reasons(connection, sorted(rejected)) if rejected else {}
        answered = 0
        for wait in due:
            answer = _answer(wait, verdicts[wait.position.token], reasons, marks)
            if answer is not None and not wait.answer.done():
                wait.answer.set_result(answer)
                self._waits.discard(wait)
                answered += 1
        return answered > 0

    async def _find_reasons(self, connection: Connection, positions: Sequence[Position]) -> dict[Position, str | None]:
        partitions, offsets = zip(*positions, strict=True)
        rows = await connection.fetch(_REASONS, partitions, offsets, self._topics)
        return {Position(row["partition"], row["offset"]): tell_reason(dict(row)) for row in rows}

    @staticmethod
    def _fail(waits: Iterable[_Wait], exc: Exception) -> None:
        for wait in waits:
            if not wait.answer.done():
                wait.answer.set_exception(exc)


def _is_due(wait: _Wait, marks: Mapping[int, Mapping[str, Any]]) -> bool:
    """Whether there may be an answer: the event is visible, or its partition shows no sign of life."""
    mark = marks.get(wait.position.partition)
    return mark is not None and (mark["input_offset"] > wait.position.offset or mark["stalled"])


def _answer(
    wait: _Wait, verdict: Verdict, reasons: Mapping[Position, str | None], marks: Mapping[int, Mapping[str, Any]]
) -> Answer | None:
    """Return the answer to a wait, None where it goes on."""
    partition = wait.position.partition
    if verdict == "reached":
        return Answer("reached", None, partition)
    if verdict == "stalled":
        return Answer("stalled", None, partition, marks[partition]["heartbeat_at"])
    if verdict == "rejected":
        reason = reasons[wait.position]
        now = time.monotonic()
        wait.rejected_at = wait.rejected_at or now
        if reason is not None or now - wait.rejected_at > _LETTER_SECONDS:
            return Answer("rejected", reason, partition)
    return None  # It was sent in again, and that input is not visible yet; or its dead letter is not.


def tell_reason(row: Mapping[str, Any]) -> str | None:
    """Return in a few words why an input was rejected, from its history and its dead letter; None where neither is."""
    if row["outcome"] in {"conflict", "gave_up"}:
        return f"{row['outcome']}: {row['reason']}"
    reason, error = row["letter_reason"] or row["reason"], row["letter_error"]
    return f"{reason}: {error}" if reason and error else reason
