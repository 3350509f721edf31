"""How full the pool of connections is: what is told of it, and the warning before it runs out."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypedDict

from pipeline.logs import get_logger
from pipeline.settings import Settings

log = get_logger("stampline.pool")


class PoolStats(TypedDict):
    """The pool at one moment; percentages are of the most connections that it may have."""

    #: Open connections.
    pool_size: int
    #: Those of them that nobody uses.
    pool_free: int
    pool_max: int
    used_connections: int
    utilization_percent: float
    exhaustion_threshold_percent: float
    #: How often the use has come up to the threshold since the start, also where that was not logged.
    exhaustion_warning_count: int


class PoolMonitor:
    """Watches how many connections are in use.

    Args:
        settings: POSTGRES_POOL_EXHAUSTION_*.
        clock: tells the time, in s; must not go back.
    """

    def __init__(self, settings: Settings, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._threshold = settings.postgres_pool_exhaustion_threshold
        self._interval_seconds = settings.postgres_pool_exhaustion_log_interval
        self._clock = clock
        self._exhausted = False
        self._crossings = 0
        self._warned_at: float | None = None

    def look(self, *, size: int, free: int, maximum: int) -> None:
        """Take note of the pool: whenever a connection was lent or came back.

        From the threshold on it warns, once in an interval for as long as that lasts.
        """
        # The quotient, as in the setting: 0.9 times 20 is not always 18.
        exhausted = (size - free) / maximum >= self._threshold
        if exhausted and not self._exhausted:
            self._crossings += 1
        self._exhausted = exhausted
        if exhausted:
            self._warn(self.stats(size=size, free=free, maximum=maximum))

    def stats(self, *, size: int, free: int, maximum: int) -> PoolStats:
        """Return what `PostgresConnectionManager.get_pool_stats` promises."""
        used = size - free
        return {
            "pool_size": size,
            "pool_free": free,
            "pool_max": maximum,
            "used_connections": used,
            "utilization_percent": _percent(used / maximum),
            "exhaustion_threshold_percent": _percent(self._threshold),
            "exhaustion_warning_count": self._crossings,
        }

    def _warn(self, stats: PoolStats) -> None:
        now = self._clock()
        silence_seconds = None if self._warned_at is None else now - self._warned_at
        if silence_seconds is not None and silence_seconds < self._interval_seconds:
            return
        self._warned_at = now
        log.warning(
            "pool_exhaustion",
            utilization_percent=stats["utilization_percent"],
            used_connections=stats["used_connections"],
            free_connections=stats["pool_free"],
            pool_size=stats["pool_size"],
            pool_max=stats["pool_max"],
            threshold_percent=stats["exhaustion_threshold_percent"],
            exhaustion_count=stats["exhaustion_warning_count"],
            time_since_last_warning_seconds=None if silence_seconds is None else round(silence_seconds, 3),
            recommendation="set DATABASE_POOL_MAX_SIZE higher, as far as PostgreSQL's max_connections allows, "
            "or look for slow queries that hold connections",
        )


def _percent(share: float) -> float:
    return round(share * 100, 2)
