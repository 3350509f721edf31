"""The feed as the projections see it."""

from __future__ import annotations

import pytest

from pipeline.errors import RecoveryFailed
from projections.feed import decode_feed
from tests.projection_samples import Record, instant, make_commit, make_progress, make_records

pytestmark = pytest.mark.unit


def test_changes_come_with_their_keys_and_in_order() -> None:
    """Every change is kept, with the uri of its record, in the order of the feed."""
    pairs = [("a", make_commit(1)), ("b", make_commit(2)), ("a", make_commit(4))]

    batch = decode_feed(make_records(*pairs))

    assert batch.keys == [b"a", b"b", b"a"]
    assert [change for _, change in pairs] == batch.changes
    assert instant(4) == batch.event_time


def test_without_progress_the_next_input_follows_the_last_change() -> None:
    """A piece that ends inside a transaction is complete up to its last change."""
    batch = decode_feed(make_records(("a", make_commit(1)), ("b", make_commit(7))))

    assert batch.next_input_offset == 8


def test_progress_says_how_far_the_reducer_has_come() -> None:
    """Inputs without a uri leave no change; the progress record counts them in, and is no change itself."""
    batch = decode_feed([*make_records(("a", make_commit(1))), make_progress(12, offset=1)])

    assert batch.next_input_offset == 12
    assert len(batch.changes) == 1


def test_only_progress_is_a_batch_too() -> None:
    """A transaction in which every input was rejected without a uri moves the input offset and nothing else."""
    batch = decode_feed([make_progress(5, offset=0)])

    assert batch.changes == []
    assert batch.event_time is None
    assert batch.next_input_offset == 5


def test_tombstones_say_nothing() -> None:
    """A tombstone removes an old state from the changelog; what analysts see of the file stays."""
    batch = decode_feed([Record(b"a", None, 0)])

    assert batch.keys == []
    assert batch.next_input_offset is None


@pytest.mark.parametrize(
    "record", [Record(b"a", b"\xc1", 41), Record(None, b"\x90", 41), Record(b"\x00progress", b"{}", 41)]
)
def test_a_foreign_record_is_named(record: Record) -> None:
    """What our reducer did not write stops the partition, and the message says where it stands."""
    with pytest.raises(RecoveryFailed, match="offset 41"):
        decode_feed([record])
