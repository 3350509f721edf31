"""The monitor of the pool: what it tells, and when it warns."""

from __future__ import annotations

from typing import Any

import pytest
from structlog.testing import capture_logs

from pipeline.pool import PoolMonitor
from pipeline.settings import Settings

pytestmark = pytest.mark.unit


class Watched:
    """A pool of 50 connections, and the monitor that looks at it at a time that the test sets."""

    def __init__(self, **options: Any) -> None:
        self.now = 500.0
        self.monitor = PoolMonitor(Settings(**options), clock=lambda: self.now)

    def use(self, *counts: int) -> None:
        """Have so many connections in use, one count after the other."""
        for used in counts:
            self.monitor.look(size=50, free=50 - used, maximum=50)


def test_the_stats_have_the_promised_names() -> None:
    """An exhausted pool: percentages are of the most it may have, and crossings count also where nothing was logged."""
    watched = Watched()
    with capture_logs():
        watched.use(45, 44, 50, 10, 45, 46, 44, 45, 0, 47)

    assert watched.monitor.stats(size=50, free=3, maximum=50) == {
        "pool_size": 50,
        "pool_free": 3,
        "pool_max": 50,
        "used_connections": 47,
        "utilization_percent": 94.0,
        "exhaustion_threshold_percent": 90.0,
        "exhaustion_warning_count": 5,
    }


def test_the_warning_has_the_promised_values() -> None:
    """The first warning knows of none before it; the next tells how long that was ago and how often it happened."""
    watched = Watched()
    with capture_logs() as lines:
        watched.use(47)
        watched.now += 30
        watched.use(0, 45, 0)
        watched.now += 45
        watched.use(48)

    first = {
        "event": "pool_exhaustion",
        "log_level": "warning",
        "utilization_percent": 94.0,
        "used_connections": 47,
        "free_connections": 3,
        "pool_size": 50,
        "pool_max": 50,
        "threshold_percent": 90.0,
        "exhaustion_count": 1,
        "time_since_last_warning_seconds": None,
    }
    for line in lines:
        assert "DATABASE_POOL_MAX_SIZE" in line.pop("recommendation")
    assert lines == [
        first,
        first
        | {
            "utilization_percent": 96.0,
            "used_connections": 48,
            "free_connections": 2,
            "exhaustion_count": 3,
            "time_since_last_warning_seconds": 75.0,
        },
    ]


def test_a_pool_that_stays_exhausted_is_told_again() -> None:
    """As long as it lasts there is one line an interval, though it is one crossing."""
    watched = Watched(postgres_pool_exhaustion_log_interval=10)
    with capture_logs() as lines:
        for _ in range(25):
            watched.use(45, 46)
            watched.now += 1

    assert [line["exhaustion_count"] for line in lines] == [1, 1, 1]


@pytest.mark.parametrize(("threshold", "used"), [(0.9, 45), (0.7, 35), (0.94, 47), (1, 50), (0.01, 1)])
def test_the_threshold_itself_is_exhaustion(threshold: float, used: int) -> None:
    """A share that is exactly the threshold warns, whatever binary fractions make of it; one below it is not."""
    watched = Watched(postgres_pool_exhaustion_threshold=threshold)
    with capture_logs() as lines:
        watched.use(used - 1)
        assert not lines
        watched.use(used)

    assert len(lines) == 1


def test_connections_not_made_yet_are_not_in_use() -> None:
    """Use is what is lent, of the most there may be: a small pool in full use has room to grow."""
    watched = Watched()
    with capture_logs() as lines:
        watched.monitor.look(size=5, free=0, maximum=50)

    assert not lines
    assert watched.monitor.stats(size=5, free=0, maximum=50)["utilization_percent"] == 10.0
