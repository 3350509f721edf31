"""Projection `files` as a pure function."""

from __future__ import annotations

import itertools
import uuid
from typing import Any

import pytest
from blake3 import blake3
from hypothesis import given
from hypothesis import strategies as st

from pipeline.events import Change
from projections import files
from tests.projection_samples import make_batch, make_commit, make_refusal, make_state

pytestmark = pytest.mark.unit


def rows_by_uri(*changes: tuple[str, Change]) -> dict[str, dict[str, Any]]:
    """Project changes and return the rows as mappings, by their uri."""
    rows = [dict(zip(files.COLUMNS, row, strict=True)) for row in files.rows(make_batch(*changes))]
    assert len({row["uri"] for row in rows}) == len(rows)
    return {row["uri"]: row for row in rows}


@st.composite
def feeds(draw: st.DrawFn) -> list[tuple[str, Change]]:
    """Draw a feed of a few files in which every kind of change occurs."""
    uris = draw(st.lists(st.sampled_from(["a", "b", "c", "ü"]), max_size=30))
    feed: list[tuple[str, Change]] = []
    states: dict[str, Any] = {}
    for offset, uri in enumerate(uris):
        state = states.get(uri)
        if draw(st.booleans()):
            version = state.version + 1 if state is not None else 1
            change = make_commit(offset, version=version, deleted=draw(st.booleans()))
            states[uri] = change.state
        else:
            change = make_refusal(offset, state)
        feed.append((uri, change))
    return feed


def test_the_last_state_of_each_file_is_shown() -> None:
    """One row per file, with the state after its last change."""
    rows = rows_by_uri(("a", make_commit(1)), ("b", make_commit(2)), ("a", make_commit(3, version=2)))

    assert {uri: (row["version"], row["input_offset"]) for uri, row in rows.items()} == {"a": (2, 3), "b": (1, 2)}


def test_a_refused_event_does_not_show() -> None:
    """What a conflict or a duplicate said is in the history only; the file keeps the state that the change carries."""
    state = make_state(1, size=5)

    rows = rows_by_uri(("a", make_refusal(8, state)))

    assert (rows["a"]["size"], rows["a"]["event_id"], rows["a"]["input_offset"]) == (5, "event-1", 1)


@pytest.mark.parametrize("state", [None, make_state(3, version=0)])
def test_a_file_without_a_version_is_not_shown(state: Any) -> None:
    """A file of which no event was ever committed does not exist for analysts."""
    assert rows_by_uri(("a", make_refusal(3, state, outcome="rejected"))) == {}


def test_a_deleted_file_stays_without_digest() -> None:
    """A deleted file is shown as deleted, with no digest."""
    rows = rows_by_uri(("a", make_commit(1, deleted=True, op="deleted")))

    assert (rows["a"]["deleted"], rows["a"]["digest"]) == (True, None)


def test_metadata_is_json_text() -> None:
    """Metadata travel as the JSON text that they are, for PostgreSQL to read."""
    rows = rows_by_uri(("a", make_commit(1, metadata='{"k":"ü"}'.encode())), ("b", make_commit(2)))

    assert (rows["a"]["metadata"], rows["b"]["metadata"]) == ('{"k":"ü"}', None)


@given(feed=feeds(), cuts=st.sets(st.integers(0, 30)))
def test_the_cut_of_the_batches_does_not_matter(feed: list[tuple[str, Change]], cuts: set[int]) -> None:
    """A feed in any batches leaves the same rows as the feed in one batch."""
    edges = sorted({0, len(feed), *(cut for cut in cuts if cut < len(feed))})
    upserted: dict[str, dict[str, Any]] = {}
    for begin, end in itertools.pairwise(edges):
        upserted.update(rows_by_uri(*feed[begin:end]))

    assert upserted == rows_by_uri(*feed)


@given(feed=feeds())
def test_projecting_again_changes_nothing(feed: list[tuple[str, Change]]) -> None:
    """A feed that is read twice leaves the rows of a feed that is read once."""
    assert rows_by_uri(*feed, *feed) == rows_by_uri(*feed)


@given(uri=st.text(min_size=1, max_size=1024))
def test_the_key_is_a_uuid_of_the_digest(uri: str) -> None:
    """The key is the beginning of BLAKE3 of the uri, so everybody who knows the uri can compute it."""
    key = uuid.UUID(files.uri_key(uri.encode("utf-8", "surrogatepass")))

    assert key.bytes == blake3(uri.encode("utf-8", "surrogatepass")).digest()[:16]
