"""The ring of query metrics."""

from __future__ import annotations

import pytest
from structlog.testing import capture_logs

from pipeline.querymetrics import QueryMetrics
from pipeline.settings import Settings

pytestmark = pytest.mark.unit


class Clock:
    """A clock that a test sets, in s."""

    now = 0.0

    def __call__(self) -> float:
        """Tell the time."""
        return self.now


def test_a_metric_has_hash_time_rows_and_whether_it_was_slow() -> None:
    """100 ms are slow; the same statement has the same hash, another one has another."""
    metrics = QueryMetrics(Settings())
    with capture_logs():
        metrics.record("SELECT 1", 99.99, 1)
        metrics.record("SELECT 1", 100.0, 2)
        metrics.record("SELECT 2", 5.0, 0)

    first, second, third = metrics.snapshot()
    assert (first.duration_ms, first.rows, first.slow) == (99.99, 1, False)
    assert (second.duration_ms, second.rows, second.slow) == (100.0, 2, True)
    assert first.statement_hash == second.statement_hash != third.statement_hash


def test_the_hash_is_the_same_everywhere() -> None:
    """Metrics of several processes can be put together by the hash."""
    metrics = QueryMetrics(Settings())
    metrics.record("SELECT 1", 1.0, 1)

    assert metrics.snapshot()[0].statement_hash == "60e6b55ff57fdf38"


def test_the_ring_is_bounded() -> None:
    """The latest POSTGRES_MAX_METRICS_STORED are kept."""
    metrics = QueryMetrics(Settings(postgres_max_metrics_stored=1000))
    for number in range(2500):
        metrics.record("SELECT 1", 1.0, number)

    assert [metric.rows for metric in metrics.snapshot()] == list(range(1500, 2500))


def test_the_summary_is_by_statement() -> None:
    """Count, slow ones, rows and nearest-rank percentiles of each statement."""
    metrics = QueryMetrics(Settings())
    with capture_logs():
        for duration_ms in range(200, 0, -1):
            metrics.record("UPDATE stampline.files SET x = $1", float(duration_ms), 3)
    metrics.record("BEGIN", 0.5, 0)

    update, begin = metrics.summary().values()
    assert (update.statement, update.count, update.slow_count, update.rows) == (
        "UPDATE stampline.files SET x",
        200,
        101,
        600,
    )
    assert (update.p50_ms, update.p99_ms) == (100.0, 198.0)
    assert (begin.statement, begin.count, begin.slow_count) == ("BEGIN", 1, 0)
    assert (begin.p50_ms, begin.p99_ms) == (0.5, 0.5)
    assert set(metrics.summary()) == {metric.statement_hash for metric in metrics.snapshot()}


def test_an_empty_ring_has_an_empty_summary() -> None:
    """Nothing has run yet."""
    assert QueryMetrics(Settings()).summary() == {}


def test_slow_statements_are_told_now_and_then() -> None:
    """At most one line a minute, with the number of slow ones that had no line of their own; quick ones have none."""
    clock = Clock()
    metrics = QueryMetrics(Settings(), clock=clock)
    with capture_logs() as lines:
        for _ in range(5):
            metrics.record("COPY stampline.file_history FROM STDIN", 123.456, 8000)
            metrics.record("BEGIN", 1.0, 0)
            clock.now += 25

    line = {
        "event": "slow_query",
        "log_level": "info",
        "statement_hash": metrics.snapshot()[0].statement_hash,
        "statement": "COPY stampline.file_history FROM STDIN",
        "duration_ms": 123.46,
        "rows": 8000,
        "threshold_ms": 100.0,
    }
    assert lines == [line | {"slow_count": 1}, line | {"slow_count": 3}]


@pytest.mark.parametrize(
    ("statement", "words"),
    [
        ("SELECT secret FROM t WHERE name = 'anna'", "SELECT secret FROM t WHERE name"),
        ("SELECT 'anna'", "SELECT"),
        ("SELECT 12345", "SELECT"),
        ("SELECT -5", "SELECT"),
        ("DO $$ anna $$", "DO"),
        ("\n  WITH moved AS (\n UPDATE", "WITH moved AS"),
        ('INSERT INTO "files" VALUES (7)', 'INSERT INTO "files" VALUES'),
        ("SELECT a FROM b JOIN c ON d", "SELECT a FROM b JOIN c"),
        ("'", ""),
    ],
)
def test_no_value_is_told(statement: str, words: str) -> None:
    """A statement is told by the few words before its first sign or number."""
    metrics = QueryMetrics(Settings())
    metrics.record(statement, 1.0, 0)

    assert metrics.snapshot()[0].statement == words
