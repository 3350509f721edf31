"""Projection `contents` as a pure function."""

from __future__ import annotations

import itertools
from collections import Counter
from datetime import datetime
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from pipeline.events import Before, Change, FileState
from projections import contents
from tests.projection_samples import instant, make_batch, make_commit, make_refusal, make_state

pytestmark = pytest.mark.unit

A, B, C = (bytes([number]) * 32 for number in (1, 2, 3))
SIZES = {A: 101, B: 102, C: 103}

Row = tuple[Any, ...]


def commit(offset: int, digest: bytes | None, before: Change | None = None) -> Change:
    """Make the commit of a content (None = the file is gone) after another change of the same file."""
    version = 1 if before is None or before.state is None else before.state.version + 1
    size = SIZES[digest] if digest is not None else None
    change = make_commit(offset, digest=digest, size=size, deleted=digest is None, version=version)
    if before is None or before.state is None:
        return change
    state = before.state
    return replace(change, before=Before(state.digest, state.size, state.deleted))


@st.composite
def feeds(draw: st.DrawFn) -> list[tuple[str, Change]]:
    """Draw a feed of a few files that share a few contents, in which every kind of change occurs."""
    last: dict[str, Change] = {}
    feed: list[tuple[str, Change]] = []
    for offset, uri in enumerate(draw(st.lists(st.sampled_from("abcd"), max_size=30))):
        before = last.get(uri)
        outcome = draw(st.sampled_from(["committed", "committed", "unchanged", "duplicate", "rejected"]))
        if outcome == "committed":
            change = commit(offset, draw(st.sampled_from([A, B, C, None])), before)
            last[uri] = change
        else:
            change = make_refusal(offset, before.state if before is not None else None, outcome=outcome)
        feed.append((uri, change))
    return feed


def merge(rows: list[Row], shown: dict[bytes, Row]) -> None:
    """Add rows to what is shown, as the table does; one without a time must find its content."""
    for digest, size, copies, first, last in rows:
        assert (first is None) == (last is None)
        assert first is not None or digest in shown
        known = shown.get(digest, (size, 0, first, last))
        times = [moment for moment in (*known[2:], first, last) if moment is not None]
        shown[digest] = (known[0], known[1] + copies, min(times), max(times))


def recount(feed: list[tuple[str, Change]]) -> dict[bytes, Row]:
    """Count the contents anew: the copies by the newest states, the times by all that was seen."""
    newest: dict[str, FileState] = {}
    seen: dict[bytes, list[datetime]] = {}
    for uri, change in feed:
        if change.state is None:
            continue
        newest[uri] = change.state
        if change.outcome in {"committed", "unchanged"} and change.state.digest is not None:
            seen.setdefault(change.state.digest, []).append(change.recorded_at)
    copies = Counter(state.digest for state in newest.values() if state.digest is not None)
    return {digest: (SIZES[digest], copies[digest], min(times), max(times)) for digest, times in seen.items()}


def test_a_new_file_adds_a_copy() -> None:
    """Files with the same content are copies of it, first and last seen when Kafka got their events."""
    batch = make_batch(("a", commit(5, B)), ("b", commit(6, A)), ("c", commit(9, B)))

    assert contents.rows(batch) == [(A, 101, 1, instant(6), instant(6)), (B, 102, 2, instant(5), instant(9))]


def test_a_new_content_takes_the_copy_from_the_old_one() -> None:
    """What only loses copies has not been seen in the batch."""
    first = commit(1, A)

    assert contents.rows(make_batch(("a", commit(2, B, first)))) == [
        (A, 101, -1, None, None),
        (B, 102, 1, instant(2), instant(2)),
    ]


def test_a_deletion_takes_the_copy_away() -> None:
    """A file that is gone has no content; deleting it again, or bringing it back, takes nothing from anything."""
    first = commit(1, A)
    gone = commit(2, None, first)

    assert contents.rows(make_batch(("a", gone))) == [(A, 101, -1, None, None)]
    assert contents.rows(make_batch(("a", commit(3, None, gone)))) == []
    assert contents.rows(make_batch(("a", commit(3, A, gone)))) == [(A, 101, 1, instant(3), instant(3))]


def test_a_deleted_state_counts_for_nothing_whatever_it_holds() -> None:
    """A digest that a deleted state still names is not a copy, neither before nor after."""
    gone = make_commit(1, digest=A, deleted=True)
    back = replace(make_commit(2, digest=B, size=102), before=Before(A, 101, deleted=True))

    assert contents.rows(make_batch(("a", gone))) == []
    assert contents.rows(make_batch(("a", back))) == [(B, 102, 1, instant(2), instant(2))]


def test_the_same_content_again_is_only_seen() -> None:
    """New metadata, and an event that changes nothing, are sightings and no copies."""
    first = commit(1, A)

    again = commit(2, A, first)
    unchanged = make_refusal(3, first.state, outcome="unchanged")
    assert contents.rows(make_batch(("a", again))) == [(A, 101, 0, instant(2), instant(2))]
    assert contents.rows(make_batch(("a", again), ("a", unchanged))) == [(A, 101, 0, instant(2), instant(3))]


@pytest.mark.parametrize("outcome", ["duplicate", "conflict", "deferred", "gave_up", "rejected"])
def test_what_is_not_taken_is_not_seen(outcome: str) -> None:
    """An event that did not get through says nothing of any content, even where it brings one."""
    batch = make_batch(("a", make_refusal(2, make_state(1), outcome=outcome)), ("b", make_refusal(3, None)))

    assert contents.rows(batch) == []


def test_times_may_come_in_any_order() -> None:
    """Producers of several clocks may write one partition: first and last are the earliest and the latest time."""
    late, early = replace(commit(1, A), recorded_at=instant(9)), replace(commit(2, A), recorded_at=instant(4))

    assert contents.rows(make_batch(("a", late), ("b", early))) == [(A, 101, 2, instant(4), instant(9))]


def test_the_first_state_of_an_unseen_file_is_new() -> None:
    """After compaction a commit may be the first that is left of its file; what it replaced was never counted."""
    batch = make_batch(("a", commit(2, B, commit(1, A))), ("a", commit(3, C, commit(2, B))))

    assert contents.rows(batch, unseen={b"a"}) == [
        (B, 102, 0, instant(2), instant(2)),
        (C, 103, 1, instant(3), instant(3)),
    ]
    assert contents.rows(batch, unseen=[b"b"]) == contents.rows(batch)


@pytest.mark.parametrize(
    ("outcome", "seen_at"),
    [("unchanged", instant(8)), ("duplicate", make_state(1).stamped_at), ("conflict", make_state(1).stamped_at)],
)
def test_any_change_brings_the_state_of_an_unseen_file(outcome: str, seen_at: datetime) -> None:
    """The last change of a file is what compaction leaves, and it carries the state whatever became of its event."""
    late = make_refusal(8, make_state(1, digest=A, size=101), outcome=outcome)

    assert contents.rows(make_batch(("a", late)), unseen={b"a"}) == [(A, 101, 1, seen_at, seen_at)]


def test_an_unseen_file_without_content_counts_for_nothing() -> None:
    """Neither a deleted file nor one that never came to a version has a copy, but the latter is still to come."""
    rejected = make_refusal(1, None, outcome="rejected")
    deleted = make_refusal(2, make_state(1, digest=None, size=None, deleted=True), outcome="duplicate")
    back = replace(commit(4, A), before=Before(B, 102, deleted=False))

    assert contents.rows(make_batch(("a", rejected), ("b", deleted)), unseen={b"a", b"b"}) == []
    assert contents.rows(make_batch(("a", rejected), ("a", back)), unseen={b"a"}) == [
        (A, 101, 1, instant(4), instant(4))
    ]


@given(feed=feeds(), cuts=st.sets(st.integers(0, 30)))
def test_the_batches_add_up_to_the_contents(feed: list[tuple[str, Change]], cuts: set[int]) -> None:
    """A feed in any batches gives the contents that are counted anew from all of it, in rows sorted by digest."""
    edges = sorted({0, len(feed), *(cut for cut in cuts if cut < len(feed))})
    shown: dict[bytes, Row] = {}
    for begin, end in itertools.pairwise(edges):
        rows = contents.rows(make_batch(*feed[begin:end]))
        assert [row[0] for row in rows] == sorted({row[0] for row in rows})
        merge(rows, shown)

    assert shown == recount(feed)


@given(feed=feeds(), cut=st.integers(0, 30), data=st.data())
def test_a_compacted_feed_gives_the_same_copies(feed: list[tuple[str, Change]], cut: int, data: st.DataObject) -> None:
    """Whatever compaction leaves out before the last change of each file, the copies are those of the whole feed."""
    last = {uri: place for place, (uri, _) in enumerate(feed)}
    kept = [data.draw(st.booleans(), label=f"keep {place}") for place in range(len(feed))]
    # Compaction deletes a beginning of what there is of each file.
    begins = {uri: min((p for p, (u, _) in enumerate(feed) if u == uri and kept[p]), default=last[uri]) for uri in last}
    left = [(uri, change) for place, (uri, change) in enumerate(feed) if place >= begins[uri]]
    known: set[bytes] = set()
    shown: dict[bytes, Row] = {}
    for piece in (left[:cut], left[cut:]):
        batch = make_batch(*piece)
        unseen = set(batch.keys) - known
        merge(contents.rows(batch, unseen=unseen), shown)
        # A file is seen once a state of it was; before that there is nothing to subtract.
        known |= {key for key, change in zip(batch.keys, batch.changes, strict=True) if change.state is not None}

    copies = {digest: row[1] for digest, row in recount(feed).items() if row[1]}
    assert {digest: row[1] for digest, row in shown.items() if row[1]} == copies
