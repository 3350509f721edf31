"""What the roles of a process count, and how Prometheus reads it: the names of all metrics are here.

Roles add plain numbers to one `Metrics`, once for each batch that has been committed; nothing is done for an event, and
nothing is counted for a batch that was aborted. Everything else (sums, labels, text) is made when somebody reads them:
Faust's `PrometheusMonitor`, which works per event, costs 21 µs an event and is not used.
"""

from __future__ import annotations

import platform
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from importlib.metadata import version
from itertools import accumulate
from typing import Final

from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, HistogramMetricFamily, InfoMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

_MILLISECONDS: Final = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000)
_BACKOFF_MS: Final = (10, 20, 50, 100, 150, 200, 250, 500, 1000, 5000)
_RECORDS: Final = (1, 10, 50, 100, 500, 1000, 2000, 4000, 8000, 16_000)
_SECONDS: Final = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)


class Histogram:
    """Values by size: how many there are up to each bound, and their sum."""

    __slots__ = ("_bounds", "_counts", "_total")

    def __init__(self, bounds: Iterable[float]) -> None:
        self._bounds = tuple(bounds)
        #: The last one is for what is above all bounds.
        self._counts = [0] * (len(self._bounds) + 1)
        self._total = 0.0

    def observe(self, value: float) -> None:
        """Count one value."""
        self._counts[bisect_left(self._bounds, value)] += 1
        self._total += value

    def add_to(self, family: HistogramMetricFamily, labels: Iterable[str] = ()) -> None:
        """Add it to what Prometheus reads."""
        names = (*(str(float(bound)) for bound in self._bounds), "+Inf")
        buckets = list(zip(names, accumulate(self._counts), strict=True))
        family.add_metric(list(labels), buckets, self._total)


class Metrics(Collector):
    """The counters of one process; they begin at zero and only grow."""

    def __init__(self) -> None:
        self._outcomes: Counter[str] = Counter()
        self._dead_letters: Counter[str] = Counter()
        self._durations: dict[str, Histogram] = {}
        self._sizes = Histogram(_RECORDS)
        #: The pause before an event is sent in again, in ms; one for each that was deferred.
        self.backoff_ms = Histogram(_BACKOFF_MS)
        #: How long the Kafka transaction of a batch of the reducer took, in ms.
        self.commit_latency_ms = Histogram(_MILLISECONDS)

    def count_batch(self, role: str, *, records: int, seconds: float) -> None:
        """Count a committed batch: its size, and the time for all work on it."""
        self._sizes.observe(records)
        if role not in self._durations:
            self._durations[role] = Histogram(_SECONDS)
        self._durations[role].observe(seconds)

    def count_outcomes(self, outcomes: Mapping[str, int]) -> None:
        """Count the inputs of a batch by what became of them; a zero makes an outcome known."""
        self._outcomes.update(outcomes)

    def count_dead_letters(self, reason: str, count: int) -> None:
        """Count dead letters that were written; none makes the reason known."""
        self._dead_letters[reason] += count

    def collect(self) -> Iterator[Metric]:
        """Yield everything that was counted, for Prometheus."""
        build = {"version": version("stampline"), "python": platform.python_version()}
        yield InfoMetricFamily("build", "The version that runs.", build)
        yield from self._collect_outcomes()
        letters = CounterMetricFamily("dead_letters", "Dead letters written, by reason.", labels=["reason"])
        for reason, count in self._dead_letters.items():
            letters.add_metric([reason], count)
        yield letters
        for name, text, histogram in (
            ("reducer_backoff_ms", "The pause before a deferred input is sent in again, in ms.", self.backoff_ms),
            ("canonical_store_commit_latency_ms", "The transaction that commits state, in ms.", self.commit_latency_ms),
            ("batch_size_records", "The records of a committed batch.", self._sizes),
        ):
            family = HistogramMetricFamily(name, text)
            histogram.add_to(family)
            yield family
        durations = HistogramMetricFamily("batch_duration_seconds", "The work on a committed batch.", labels=["role"])
        for role, histogram in self._durations.items():
            histogram.add_to(durations, [role])
        yield durations

    def _collect_outcomes(self) -> Iterator[Metric]:
        """Yield what the outcomes say: each input has exactly one, so the sums need no counters of their own."""
        by_outcome = CounterMetricFamily("reducer_outcomes", "Inputs by what became of them.", labels=["outcome"])
        for outcome, count in self._outcomes.items():
            by_outcome.add_metric([outcome], count)
        yield by_outcome
        told = self._outcomes
        for name, text, count in (
            (
                "reducer_successful_actions",
                "Inputs after which the file is as they say: committed or unchanged.",
                told["committed"] + told["unchanged"],
            ),
            (
                "reducer_conflict_attempts",
                "Attempts that expected another version than there was: conflict, deferred or gave_up.",
                told["conflict"] + told["deferred"] + told["gave_up"],
            ),
            ("reducer_gave_up", "Inputs whose expected version has not come in any attempt.", told["gave_up"]),
            ("canonical_store_state_commits", "New versions of files.", told["committed"]),
            ("canonical_store_state_conflicts", "Inputs that expected a version of the past.", told["conflict"]),
            (
                "action_dedup_checks",
                "Inputs whose event id was looked up: all but the rejected.",
                told.total() - told["rejected"],
            ),
            ("action_dedup_hits", "Inputs whose event id was known.", told["duplicate"]),
        ):
            yield CounterMetricFamily(name, text, count)


def make_registry(*collectors: Collector) -> CollectorRegistry:
    """Return what Prometheus reads of a process: these, and nothing that a library counts for itself."""
    registry = CollectorRegistry()
    for collector in collectors:
        registry.register(collector)
    return registry
