"""The counters of a process, and how Prometheus reads them."""

from __future__ import annotations

from typing import Any

import pytest
from aiohttp.test_utils import TestClient, TestServer
from aiohttp.web import Application
from prometheus_client import generate_latest
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.samples import Sample

from pipeline.events import OUTCOMES
from pipeline.health import add_metrics_page
from pipeline.metrics import Histogram, Metrics, make_registry

pytestmark = pytest.mark.unit

#: Names and labels are promises to users: the part of the contract that is counted in `pipeline/metrics.py`.
CONTRACT = {
    "action_dedup_checks_total": (),
    "action_dedup_hits_total": (),
    "batch_duration_seconds": ("role",),
    "batch_size_records": (),
    "build_info": ("python", "version"),
    "canonical_store_commit_latency_ms": (),
    "canonical_store_state_commits_total": (),
    "canonical_store_state_conflicts_total": (),
    "dead_letters_total": ("reason",),
    "reducer_backoff_ms": (),
    "reducer_conflict_attempts_total": (),
    "reducer_gave_up_total": (),
    "reducer_outcomes_total": ("outcome",),
    "reducer_successful_actions_total": (),
}


def read(metrics: Metrics) -> list[Sample]:
    """Return what Prometheus reads."""
    text = generate_latest(make_registry(metrics)).decode()
    return [sample for family in text_string_to_metric_families(text) for sample in family.samples]


def values(metrics: Metrics) -> dict[Any, float]:
    """Return every sample by its name, and its labels if it has some."""
    return {(s.name, *dict(sorted(s.labels.items())).values()) if s.labels else s.name: s.value for s in read(metrics)}


def make_counted() -> Metrics:
    """Count two batches of the reducer."""
    metrics = Metrics()
    metrics.count_outcomes(dict.fromkeys(OUTCOMES, 0))
    metrics.count_outcomes({"committed": 5, "unchanged": 1, "duplicate": 2, "conflict": 3})
    metrics.count_outcomes({"committed": 2, "deferred": 4, "gave_up": 1, "rejected": 6})
    metrics.count_dead_letters("gave_up", 1)
    metrics.count_batch("reducer", records=11, seconds=0.004)
    metrics.count_batch("reducer", records=13, seconds=30)
    for pause_ms in (10.0, 10.5, 249.0, 251.0):
        metrics.backoff_ms.observe(pause_ms)
    metrics.commit_latency_ms.observe(7)
    return metrics


def test_names_and_labels_are_those_of_the_contract() -> None:
    """Nothing else is told, and each histogram has its buckets, its sum and its count."""
    told: dict[str, set[str]] = {}
    for sample in read(make_counted()):
        name = sample.name
        for suffix in ("_bucket", "_count", "_sum"):
            name = name.removesuffix(suffix)
        told.setdefault(name, set()).update(sample.labels.keys() - {"le"})

    assert {name: tuple(sorted(labels)) for name, labels in sorted(told.items())} == CONTRACT


def test_outcomes_say_all_about_inputs() -> None:
    """Each input has one outcome; what is called an action, an attempt or a commit is a sum of them."""
    told = values(make_counted())

    assert {outcome: told["reducer_outcomes_total", outcome] for outcome in OUTCOMES} == {
        "committed": 7,
        "unchanged": 1,
        "duplicate": 2,
        "conflict": 3,
        "deferred": 4,
        "gave_up": 1,
        "rejected": 6,
    }
    assert told["reducer_successful_actions_total"] == 8
    assert told["reducer_conflict_attempts_total"] == 8
    assert told["reducer_gave_up_total"] == 1
    assert told["canonical_store_state_commits_total"] == 7
    assert told["canonical_store_state_conflicts_total"] == 3
    assert told["action_dedup_checks_total"] == 18
    assert told["action_dedup_hits_total"] == 2
    assert told["dead_letters_total", "gave_up"] == 1


def test_an_outcome_that_never_came_is_zero() -> None:
    """A rate over a counter that is not there yet would be no data, not none."""
    metrics = Metrics()
    metrics.count_outcomes(dict.fromkeys(OUTCOMES, 0))
    metrics.count_dead_letters("gave_up", 0)
    told = values(metrics)

    assert [told["reducer_outcomes_total", outcome] for outcome in OUTCOMES] == [0] * len(OUTCOMES)
    assert told["dead_letters_total", "gave_up"] == 0


def test_histograms_are_cumulative() -> None:
    """A value on a bound is below it; what is above all bounds is in +Inf alone."""
    told = values(make_counted())

    assert [told["reducer_backoff_ms_bucket", le] for le in ("10.0", "20.0", "200.0", "250.0", "500.0", "+Inf")] == [
        1,
        2,
        2,
        3,
        4,
        4,
    ]
    assert (told["reducer_backoff_ms_sum"], told["reducer_backoff_ms_count"]) == (520.5, 4)
    assert told["batch_duration_seconds_bucket", "10.0", "reducer"] == 1
    assert told["batch_duration_seconds_bucket", "+Inf", "reducer"] == 2
    assert told["batch_size_records_sum"] == 24


def test_a_histogram_has_fixed_buckets() -> None:
    """However much is counted, it keeps as many numbers."""
    histogram = Histogram((1, 2))
    for value in range(1000):
        histogram.observe(value)

    assert histogram._counts == [2, 1, 997]


async def test_the_page_is_text_for_prometheus() -> None:
    """`/metrics` has the content type that Prometheus asks for, and reads anew each time."""
    metrics = make_counted()
    web = Application()
    add_metrics_page(web.router, make_registry(metrics))
    async with TestClient(TestServer(web)) as client:
        first = await client.get("/metrics")
        metrics.count_outcomes({"committed": 1})
        second = await (await client.get("/metrics")).text()

        assert first.status == 200
        assert first.headers["Content-Type"].startswith("text/plain; version=")
        assert "charset=utf-8" in first.headers["Content-Type"]
        assert "canonical_store_state_commits_total 7.0" in await first.text()
        assert "canonical_store_state_commits_total 8.0" in second
