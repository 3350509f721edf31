"""The named queries."""

from __future__ import annotations

import re
from importlib.resources import files

import pytest

from projections.queries import query

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
