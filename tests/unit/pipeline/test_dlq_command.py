"""`stampline dlq`: what is asked wrongly is told before anything is asked of Kafka or PostgreSQL."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from pipeline.cli.dlq import command, printable
from pipeline.letters import FoundLetter
from pipeline.records import LetterId
from pipeline.replays import _BYTES_MAX, _LETTERS_MAX, _portions

pytestmark = pytest.mark.unit


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["show", "file-events:3"], "is no TOPIC:PARTITION:OFFSET"),
        (["show", "file-events:3:0:0"], "is no TOPIC:PARTITION:OFFSET"),
        (["show", "file events:3:0"], "is no TOPIC:PARTITION:OFFSET"),
        (["replay", "file-events:-1:0"], "is no TOPIC:PARTITION:OFFSET"),
        (["drop", f"file-events:0:{2**63}"], "is no TOPIC:PARTITION:OFFSET"),
        (["replay"], "name letters"),
        (["replay", "--reason", "undecodable"], "name letters"),
        (["drop", "file-events:3:0", "--all"], "not both"),
        (["drop", "file-events:3:0", "--reason", "x"], "not both"),
        (["drop", "file-events:3:0", "--limit", "1"], "not both"),
        (["list", "--since", "yesterday"], "neither a time such as"),
        (["list", "--since", "999999d"], "neither a time such as"),
        (["list", "--limit", "0"], "is not in the range"),
        (["list", "--status", "gone"], "is not one of"),
    ],
)
def test_wrong_usage_has_exit_code_2(arguments: list[str], text: str) -> None:
    """And standard output stays empty."""
    result = CliRunner().invoke(command, arguments)

    assert (result.exit_code, result.stdout) == (2, "")
    assert text in result.stderr


@given(st.text(), st.sampled_from(["", "\n\t"]))
def test_no_text_moves_a_terminal(text: str, keep: str) -> None:
    """Nothing but what can be printed is left, and text that can be printed is left as it is."""
    shown = printable(text, keep=keep)

    assert all(char.isprintable() or char in keep for char in shown)
    assert shown == text or not text.isprintable()


@given(st.lists(st.integers(0, 2 * _BYTES_MAX), max_size=500))
def test_a_transaction_takes_a_bounded_number_of_letters(sizes: list[int]) -> None:
    """All of them, in order, in portions of bounded number and size; a larger letter goes alone."""
    now = datetime(2026, 11, 23, tzinfo=UTC)
    letters = [
        FoundLetter(LetterId("t", 0, place), "r", "e", None, now + timedelta(seconds=place), "open", 1, size, place)
        for place, size in enumerate(sizes)
    ]
    portions = _portions(letters)

    assert [letter for portion in portions for letter in portion] == letters
    for portion in portions:
        assert 1 <= len(portion) <= _LETTERS_MAX
        assert len(portion) == 1 or sum(letter.payload_bytes for letter in portion) <= _BYTES_MAX
