"""Projection `activity` as a pure function."""

from __future__ import annotations

import itertools
from collections import Counter
from datetime import UTC, datetime, timedelta, timezone
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from pipeline.events import OUTCOMES, Change
from projections import activity, file_history
from tests.projection_samples import NOON, instant, make_batch, make_commit, make_refusal, make_state

pytestmark = pytest.mark.unit

NUMBERS = activity.COLUMNS[3:]


def project(*changes: Change) -> list[dict[str, Any]]:
    """Project changes and return the rows as mappings, without the numbers that are 0."""
    rows = activity.rows(make_batch(*(("a", change) for change in changes)))
    return [
        {name: value for name, value in zip(activity.COLUMNS, row, strict=True) if name not in NUMBERS or value}
        for row in rows
    ]


@st.composite
def feeds(draw: st.DrawFn) -> list[Change]:
    """Draw changes of every outcome, with and without a state and facts, a few minutes long and in any order."""
    feed: list[Change] = []
    for offset in range(draw(st.integers(0, 25))):
        outcome = draw(st.sampled_from(OUTCOMES))
        state = make_state(
            offset,
            size=draw(st.none() | st.integers(0, 9)),
            op=draw(st.sampled_from(["created", "deleted"])),
            namespace=draw(st.sampled_from(["n", "m"])),
        )
        if outcome == "committed":
            change = Change(outcome=outcome, input_offset=offset, recorded_at=NOON, state=state)
        else:
            change = make_refusal(offset, draw(st.sampled_from([None, state])), outcome=outcome)
            if draw(st.booleans()):
                change = replace(change, event=None)
            elif change.event is not None:
                facts = {"op": draw(st.none() | st.just("x")), "size": draw(st.none() | st.just(5))}
                change = replace(change, event=replace(change.event, **facts, namespace=draw(st.none() | st.just("n"))))
        feed.append(replace(change, recorded_at=NOON + timedelta(seconds=draw(st.integers(-150, 150)))))
    return feed


def recount(feed: list[Change]) -> dict[tuple[Any, ...], Counter[str]]:
    """Count the rows that `file_history` has for these changes."""
    counted: dict[tuple[Any, ...], Counter[str]] = {}
    for row in file_history.rows(make_batch(*(("a", change) for change in feed)), 3, NOON):
        told = dict(zip(file_history.COLUMNS, row, strict=True))
        seconds = told["recorded_at"].timestamp()
        minute = datetime.fromtimestamp(seconds - seconds % 60, UTC)
        numbers = counted.setdefault((minute, told["namespace"] or "", told["op"] or ""), Counter())
        numbers.update({"events": 1, "bytes": told["size"] or 0, told["outcome"]: 1})
    return counted


def test_each_minute_has_its_row() -> None:
    """Inputs are counted by the minute in which Kafka got them, by namespace and by op, in rows sorted by these."""
    rows = project(
        make_commit(60),
        make_commit(59, op="created"),
        make_commit(1),
        make_commit(2, namespace="a"),
        make_commit(119),
    )

    assert rows == [
        {"minute": NOON, "namespace": "a", "op": "modified", "events": 1, "bytes": 102, "committed": 1},
        {"minute": NOON, "namespace": "default", "op": "created", "events": 1, "bytes": 159, "committed": 1},
        {"minute": NOON, "namespace": "default", "op": "modified", "events": 1, "bytes": 101, "committed": 1},
        {"minute": instant(60), "namespace": "default", "op": "modified", "events": 2, "bytes": 379, "committed": 2},
    ]


@pytest.mark.parametrize("outcome", [outcome for outcome in OUTCOMES if outcome != "committed"])
def test_each_outcome_is_counted_as_the_event_tells_it(outcome: str) -> None:
    """What did not become the state is counted under the event's own namespace and op, with the event's bytes."""
    assert project(make_refusal(1, make_state(0), outcome=outcome)) == [
        {"minute": NOON, "namespace": "other", "op": "created", "events": 1, "bytes": 9, outcome: 1}
    ]


def test_what_is_not_known_is_empty() -> None:
    """An input that could hardly be read has neither namespace nor op nor bytes, and is counted all the same."""
    assert project(make_refusal(1, None, outcome="rejected", event=None)) == [
        {"minute": NOON, "namespace": "", "op": "", "events": 1, "rejected": 1}
    ]


def test_a_minute_is_one_of_utc() -> None:
    """The same instant has the same minute in every time zone, also in those that are off by seconds."""
    odd = timezone(timedelta(hours=1, seconds=30))
    change = make_commit(10)

    rows = project(change, replace(change, recorded_at=change.recorded_at.astimezone(odd)))

    assert [(row["minute"], row["events"]) for row in rows] == [(NOON, 2)]


@given(feed=feeds(), cuts=st.sets(st.integers(0, 25)))
def test_the_batches_add_up_to_the_history(feed: list[Change], cuts: set[int]) -> None:
    """A feed in any batches gives the numbers that are counted from the rows of its history."""
    edges = sorted({0, len(feed), *(cut for cut in cuts if cut < len(feed))})
    shown: dict[tuple[Any, ...], Counter[str]] = {}
    for begin, end in itertools.pairwise(edges):
        rows = activity.rows(make_batch(*(("a", change) for change in feed[begin:end])))
        assert [row[:3] for row in rows] == sorted({row[:3] for row in rows})
        for row in rows:
            shown.setdefault(row[:3], Counter()).update(dict(zip(NUMBERS, row[3:], strict=True)))

    assert shown == recount(feed)
