"""The circuit breaker: a database that does not answer is left alone, and tried again with care.

Pure policy: it knows no driver and no network. Who makes a call says what counts as a failure of the connection; an
error in the data and a cancellation are neither failure nor success.

========= ============================================================================================================
closed    calls go through; so many failures in a row, with no success between them, open it
open      calls are refused at once; the recovery timeout makes it half open
half open at most so many calls at once go through, the rest is refused; as many successes close it, a failure opens it
========= ============================================================================================================

A call speaks only for the period it began in: how one from before a change of state ends says nothing new.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Literal, Self, TypeAlias

from pipeline.errors import ServiceUnavailable
from pipeline.logs import get_logger
from pipeline.settings import Settings

State: TypeAlias = Literal["closed", "half_open", "open"]

log = get_logger("stampline.breaker")


class DatabaseCircuitBreaker:
    """Decides which calls may go to the database.

    Args:
        failure_threshold: failures in a row that open it.
        recovery_timeout_seconds: how long it stays open.
        half_open_max_calls: most calls at once while half open, and how many successes close it.
        clock: tells the time, in s; must not go back.
    """

    def __init__(
        self,
        *,
        failure_threshold: int,
        recovery_timeout_seconds: float,
        half_open_max_calls: int,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._failure_threshold = failure_threshold
        self._recovery_timeout_seconds = recovery_timeout_seconds
        self._half_open_max_calls = half_open_max_calls
        self._clock = clock
        self._state: State = "closed"
        # Counts the changes of state; a call that comes back with another number is from an earlier one.
        self._period = 0
        self._calls = 0
        self._successes = 0
        self._failures = 0
        self._left_closed_at = 0.0
        self._retry_at = 0.0

    @classmethod
    def from_config(cls, config: Settings, *, clock: Callable[[], float] = time.monotonic) -> Self:
        """Make the breaker that DB_CIRCUIT_BREAKER_* describe."""
        return cls(
            failure_threshold=config.db_circuit_breaker_failure_threshold,
            recovery_timeout_seconds=config.db_circuit_breaker_recovery_timeout,
            half_open_max_calls=config.db_circuit_breaker_half_open_max_calls,
            clock=clock,
        )

    @property
    def state(self) -> State:
        """The state now: an open one becomes half open by time alone."""
        if self._state == "open" and self._clock() >= self._retry_at:
            return "half_open"
        return self._state

    @contextmanager
    def guard(self, place: str, is_failure: Callable[[Exception], bool]) -> Iterator[None]:
        """Let one call through: the block. `place` says in messages where the database is.

        Raises:
            ServiceUnavailable: the call is refused; the block has not begun.
        """
        period = self._admit(place)
        try:
            yield
        except Exception as exc:
            if is_failure(exc):
                self._fail(period, place, exc)
            raise
        else:
            self._succeed(period, place)
        finally:
            if period == self._period:
                self._calls -= 1

    def refuse_while_open(self, place: str) -> None:
        """Ask without making a call, for what goes on in the background.

        Raises:
            ServiceUnavailable: the database is to be left alone.
        """
        if self.state != "open":
            return
        times = "1 failure" if self._failures == 1 else f"{self._failures} failures in a row"
        raise ServiceUnavailable(
            f"PostgreSQL at {place} is left alone after {times}; next try in "
            f"{math.ceil(self._retry_at - self._clock())} s (DB_CIRCUIT_BREAKER_RECOVERY_TIMEOUT)"
        )

    def _admit(self, place: str) -> int:
        if self._state == "open":
            self.refuse_while_open(place)
            self._become("half_open")
        if self._state == "half_open" and self._calls >= self._half_open_max_calls:
            raise ServiceUnavailable(
                f"PostgreSQL at {place} is being tried again, by at most {self._half_open_max_calls} calls at once "
                "(DB_CIRCUIT_BREAKER_HALF_OPEN_MAX_CALLS)"
            )
        self._calls += 1
        return self._period

    def _succeed(self, period: int, place: str) -> None:
        if period != self._period:
            return
        self._failures = 0
        if self._state != "half_open":
            return
        self._successes += 1
        if self._successes >= self._half_open_max_calls:
            self._become("closed")
            away_seconds = round(self._clock() - self._left_closed_at, 3)
            log.info("breaker_closed", place=place, successes=self._successes, away_seconds=away_seconds)

    def _fail(self, period: int, place: str, exc: Exception) -> None:
        if period != self._period:
            return
        self._failures += 1
        if self._state == "closed" and self._failures < self._failure_threshold:
            return
        if self._state == "closed":
            self._left_closed_at = self._clock()
        self._retry_at = self._clock() + self._recovery_timeout_seconds
        self._become("open")
        log.warning(
            "breaker_opened",
            place=place,
            failures=self._failures,
            error=f"{type(exc).__name__}: {exc}".partition("\n")[0],
            recovery_timeout_seconds=self._recovery_timeout_seconds,
        )

    def _become(self, state: State) -> None:
        self._state = state
        self._period += 1
        self._calls = 0
        if state == "half_open":
            self._successes = 0
