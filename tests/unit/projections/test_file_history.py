"""Projection `file_history` as a pure function."""

from __future__ import annotations

from typing import Any

import pytest

from pipeline.events import Change
from projections import file_history
from tests.projection_samples import NOON, instant, make_batch, make_commit, make_refusal, make_state

pytestmark = pytest.mark.unit


def project(*changes: tuple[str, Change]) -> list[dict[str, Any]]:
    """Project changes of partition 3 and return the rows as mappings."""
    rows = file_history.rows(make_batch(*changes), 3, NOON)
    return [dict(zip(file_history.COLUMNS, row, strict=True)) for row in rows]


def test_every_change_has_a_row() -> None:
    """The history keeps every outcome, repeated ones of the same file too, in the order of the feed."""
    rows = project(("a", make_commit(1)), ("b", make_commit(2)), ("a", make_refusal(3, make_state(1))))

    assert [(row["uri"], row["input_offset"]) for row in rows] == [("a", 1), ("b", 2), ("a", 3)]
    assert {(3, NOON)} == {(row["input_partition"], row["projected_at"]) for row in rows}


def test_a_commit_tells_the_state() -> None:
    """A committed event became the state, so the row says what the state says."""
    (row,) = project(("a", make_commit(4, version=7)))

    assert (row["outcome"], row["version"], row["event_id"], row["size"]) == ("committed", 7, "event-4", 104)
    assert (row["digest"], row["recorded_at"]) == (b"\x04" * 32, instant(4))


def test_a_refusal_tells_the_event() -> None:
    """An event that did not become the state is told in its own words, with the version that the file has."""
    (row,) = project(("a", make_refusal(9, make_state(4, version=7), outcome="gave_up", reason="conflict")))

    assert (row["outcome"], row["reason"], row["version"]) == ("gave_up", "conflict", 7)
    assert (row["event_id"], row["size"], row["namespace"]) == ("event-9", 9, "other")


def test_a_refusal_without_facts_tells_the_state() -> None:
    """Where the change says nothing about the event, the state has to do."""
    (row,) = project(("a", make_refusal(9, make_state(4), outcome="duplicate", event=None)))

    assert (row["outcome"], row["event_id"]) == ("duplicate", "event-4")


def test_a_rejected_input_of_an_unknown_file_has_no_version() -> None:
    """A file that was never known has neither state nor version; its uri and its reason are told."""
    (row,) = project(("a", make_refusal(9, None, outcome="rejected", reason="invalid_event", event=None)))

    assert (row["uri"], row["outcome"], row["reason"]) == ("a", "rejected", "invalid_event")
    assert [row[name] for name in ("version", "event_id", "op", "namespace", "digest", "occurred_at")] == [None] * 6


def test_a_deletion_has_no_digest() -> None:
    """The digest of a deleted file is null in the history as in `files`."""
    (row,) = project(("a", make_commit(1, deleted=True, op="deleted")))

    assert row["digest"] is None
