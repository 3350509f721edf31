"""Tokens, and why an event was rejected."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.client import Position
from pipeline.errors import InvalidToken
from pipeline.waiting import tell_reason

pytestmark = pytest.mark.unit


@given(st.integers(0, 10**9 - 1), st.integers(0, 10**18 - 1))
def test_a_token_is_read_back(partition: int, offset: int) -> None:
    """What a producer gets for its event names the event."""
    position = Position(partition, offset)

    assert Position.parse(position.token) == position


@given(st.text())
def test_anything_else_is_no_token(text: str) -> None:
    """What is no token is refused, with what one looks like."""
    with pytest.raises(InvalidToken, match="file-events:PARTITION:OFFSET"):
        Position.parse(text)


@pytest.mark.parametrize(
    "text", ["file-events:1", "file-events:1:", "file-events:1:2\n", " file-events:1:2", "file-events:1:٣", "a:1:2"]
)
def test_almost_a_token_is_none(text: str) -> None:
    """Nothing is guessed."""
    with pytest.raises(InvalidToken, match="is no token"):
        Position.parse(text)


def row(**fields: Any) -> dict[str, Any]:
    """Make what is found of an input, nothing but what is given."""
    return dict.fromkeys(("outcome", "reason", "letter_reason", "letter_error")) | fields


@pytest.mark.parametrize(
    ("found", "reason"),
    [
        (row(outcome="conflict", reason="expected version 1, is 3"), "conflict: expected version 1, is 3"),
        (
            row(outcome="gave_up", reason="expected version 5, is 0", letter_reason="gave_up", letter_error="…"),
            "gave_up: expected version 5, is 0",
        ),
        (row(letter_reason="undecodable", letter_error="no JSON"), "undecodable: no JSON"),
        (row(outcome="rejected", reason="content_missing"), "content_missing"),
        (
            row(outcome="rejected", reason="content_missing", letter_reason="content_missing", letter_error="no file"),
            "content_missing: no file",
        ),
        (row(), None),
    ],
)
def test_a_reason_is_told_in_a_few_words(found: dict[str, Any], reason: str | None) -> None:
    """A code and what it means here, from the history or from the dead letter, whichever knows more."""
    assert tell_reason(found) == reason
