"""What a projector tells of a partition, and when it keeps silent."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.transport import Reach
from projections.heartbeat import Pulse, find_pulse

pytestmark = pytest.mark.unit


def pulse(feed_offset: int, reach: Reach | None, *, failing: bool = False) -> tuple[int, bool] | None:
    """Return feed end and whether it is caught up."""
    found = find_pulse(("files",), 3, feed_offset, reach, failing=failing)
    return None if found is None else (found.feed_end, found.caught_up)


def test_a_marker_at_the_end_is_nothing_that_is_missing() -> None:
    """All records are projected and the fetch has passed the marker: the feed ends where the projection stands."""
    reach = Reach(position=11, taken=10, end=11, age_seconds=0.1)

    assert find_pulse(("files", "contents"), 3, 10, reach, failing=False) == Pulse(
        ("files", "contents"), 3, feed_offset=10, feed_end=10, caught_up=True
    )


@pytest.mark.parametrize(
    ("feed_offset", "reach", "feed_end"),
    [
        (4, Reach(position=11, taken=10, end=11, age_seconds=0.1), 11),
        (10, Reach(position=10, taken=10, end=40, age_seconds=0.1), 40),
        (0, Reach(position=0, taken=None, end=40, age_seconds=0.1), 40),
        (4, Reach(position=10, taken=10, end=9, age_seconds=0.1), 10),
        (4, Reach(position=10, taken=10, end=40, age_seconds=60.0), 40),
    ],
    ids=["in flight", "not fetched", "just opened", "the end is old", "too busy to be fetched"],
)
def test_what_is_missing_is_told(feed_offset: int, reach: Reach, feed_end: int) -> None:
    """Records that are in flight, pending or not fetched yet are missing."""
    assert pulse(feed_offset, reach) == (feed_end, False)


def test_nobody_speaks_for_a_kafka_that_does_not_answer() -> None:
    """Without an answer to a fetch nobody knows what is missing: there is no pulse, whether or not it was caught up."""
    assert pulse(10, None) is None
    assert pulse(10, Reach(position=11, taken=10, end=11, age_seconds=5.1)) is None
    assert pulse(10, Reach(position=10, taken=10, end=40, age_seconds=5.1)) is None


def test_a_partition_that_fails_keeps_silent() -> None:
    """After a failure there is a pulse again once a batch has succeeded, or when nothing is missing."""
    assert pulse(4, Reach(position=4, taken=None, end=11, age_seconds=0.1), failing=True) is None
    assert pulse(4, Reach(position=11, taken=10, end=11, age_seconds=0.1), failing=True) is None
    assert pulse(10, Reach(position=11, taken=None, end=11, age_seconds=0.1), failing=True) == (10, True)


@given(
    st.integers(0, 50),
    st.builds(Reach, st.integers(0, 50), st.none() | st.integers(0, 50), st.integers(0, 50), st.floats(0, 10)),
    st.booleans(),
)
def test_a_feed_never_ends_before_what_is_projected(feed_offset: int, reach: Reach, failing: bool) -> None:
    """The rows behind are never less than none, and none where it is caught up."""
    found = find_pulse((), 0, feed_offset, reach, failing=failing)

    if found is not None:
        assert found.feed_end >= found.feed_offset == feed_offset
        assert found.feed_end == feed_offset or not found.caught_up
