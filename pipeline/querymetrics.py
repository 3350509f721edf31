"""What the latest statements took, in a ring of bounded size.

A statement is known by a hash of its text; values are arguments (`$1`), so neither the hash nor a log line holds any.
"""

from __future__ import annotations

import hashlib
import math
import re
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Final, NamedTuple

from pipeline.logs import get_logger
from pipeline.settings import Settings

#: From here on a statement is slow, in ms.
SLOW_MS: Final = 100.0

#: Least time between two lines about slow statements, in s.
_LOG_INTERVAL_SECONDS: Final = 60.0

# The words that a statement begins with, up to the first sign: a literal value always begins with one, or with a digit.
_FIRST_WORDS: Final = re.compile(r'[A-Za-z_"][\w."]*(?:\s+[A-Za-z_"][\w."]*){0,5}')

log = get_logger("stampline.queries")


class QueryMetric(NamedTuple):
    """One statement that was run, also one that failed or was cancelled (then without rows)."""

    statement_hash: str
    #: The first words of the statement, for people.
    statement: str
    duration_ms: float
    #: Rows returned or touched.
    rows: int
    slow: bool


@dataclass(frozen=True, slots=True)
class StatementSummary:
    """All runs of one statement that are still in the ring."""

    statement: str
    count: int
    slow_count: int
    rows: int
    p50_ms: float
    p99_ms: float


class QueryMetrics:
    """The ring: POSTGRES_MAX_METRICS_STORED statements, the oldest goes first.

    Args:
        settings: for the size.
        clock: tells the time, in s; must not go back.
    """

    def __init__(self, settings: Settings, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._ring: deque[QueryMetric] = deque(maxlen=settings.postgres_max_metrics_stored)
        self._clock = clock
        self._told_at: float | None = None
        self._untold = 0

    def record(self, statement: str, duration_ms: float, rows: int) -> None:
        """Take note of one run of a statement."""
        statement_hash, words = _identify(statement)
        metric = QueryMetric(statement_hash, words, duration_ms, rows, duration_ms >= SLOW_MS)
        self._ring.append(metric)
        if metric.slow:
            self._untold += 1
            self._tell(metric)

    def snapshot(self) -> tuple[QueryMetric, ...]:
        """Return what is in the ring, the oldest first."""
        return tuple(self._ring)

    def summary(self) -> dict[str, StatementSummary]:
        """Sum up the ring by the hash of the statement. It sorts the whole ring: for a page, not for a batch."""
        runs: dict[str, list[QueryMetric]] = {}
        for metric in self.snapshot():
            runs.setdefault(metric.statement_hash, []).append(metric)
        return {statement_hash: _sum_up(metrics) for statement_hash, metrics in runs.items()}

    def _tell(self, metric: QueryMetric) -> None:
        now = self._clock()
        if self._told_at is not None and now - self._told_at < _LOG_INTERVAL_SECONDS:
            return
        log.info(
            "slow_query",
            statement_hash=metric.statement_hash,
            statement=metric.statement,
            duration_ms=round(metric.duration_ms, 2),
            rows=metric.rows,
            # This one, and those since the last line that had none of their own.
            slow_count=self._untold,
            threshold_ms=SLOW_MS,
        )
        self._told_at = now
        self._untold = 0


@lru_cache(maxsize=512)
def _identify(statement: str) -> tuple[str, str]:
    """Return the hash of a statement, the same in every process, and its first words."""
    words = _FIRST_WORDS.match(statement.lstrip())
    return (
        hashlib.blake2b(statement.encode(), digest_size=8).hexdigest(),
        " ".join(words[0].split()) if words is not None else "",
    )


def _sum_up(metrics: Sequence[QueryMetric]) -> StatementSummary:
    durations_ms = sorted(metric.duration_ms for metric in metrics)
    return StatementSummary(
        statement=metrics[0].statement,
        count=len(metrics),
        slow_count=sum(metric.slow for metric in metrics),
        rows=sum(metric.rows for metric in metrics),
        p50_ms=_percentile(durations_ms, 0.50),
        p99_ms=_percentile(durations_ms, 0.99),
    )


def _percentile(ascending: Sequence[float], share: float) -> float:
    """Return the least value that so large a share of the values does not exceed."""
    return ascending[math.ceil(share * len(ascending)) - 1]
