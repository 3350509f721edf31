"""The named queries."""

from __future__ import annotations

import re
from importlib.resources import files

import pytest

from projections.queries import query
from projections.storage import LIVE, OLD, SHADOW, WRITERS_LOCK

pytestmark = pytest.mark.unit


def test_every_query_has_a_comment_and_a_statement() -> None:
    """A query says what it is for; what is sent to PostgreSQL is the statement alone."""
    script = files("projections").joinpath("queries.sql").read_text(encoding="utf-8")
    names = re.findall(r"^-- name: (\w+)\n-- \S", script, re.MULTILINE)

    assert len(names) == script.count("-- name: ")
    assert all(query(name).split()[0].isupper() for name in names)
    assert not any("--" in query(name) for name in names)


def test_an_unknown_query_is_an_error() -> None:
    """A query that is misspelt is found at once."""
    with pytest.raises(KeyError, match="no_such_query"):
        query("no_such_query")


def test_a_query_can_be_for_another_schema() -> None:
    """Every table of ours that a statement names is of the schema asked for, and nothing else of it changes."""
    live = query("upsert_contents")
    shadow = query("upsert_contents", SHADOW)

    assert live == query("upsert_contents", LIVE)
    assert live.count("stampline.") == shadow.count("stampline_shadow.") == 2
    assert shadow == live.replace("stampline.", "stampline_shadow.")
    assert query("upsert_contents", OLD) == live.replace("stampline.", "stampline_old.")


def test_the_lock_of_the_writers_is_the_one_that_is_told() -> None:
    """Who wants to write alone takes the very lock that every writer shares."""
    assert query("begin_writing") == f"SELECT pg_advisory_xact_lock_shared({WRITERS_LOCK})"
