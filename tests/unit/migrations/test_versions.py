"""The migrations as files."""

from __future__ import annotations

from pathlib import Path

import pytest

import migrations.run
from migrations.schema import HISTORY_PARTITION, metadata

pytestmark = pytest.mark.unit


def test_migrations_are_numbered_in_a_row() -> None:
    """A migration's file begins with its revision, and revisions count up without a gap."""
    folder = Path(migrations.run.__file__).parent / "versions"
    numbers = sorted(path.name.split("_")[0] for path in folder.glob("*.py"))

    assert [f"{number:04d}" for number in range(1, len(numbers) + 1)] == numbers
    assert migrations.run.head() == numbers[-1]


def test_partitions_of_the_history_are_told_from_tables() -> None:
    """Autogenerate leaves out the monthly partitions and nothing else."""
    assert HISTORY_PARTITION.fullmatch("file_history_2026_11")
    assert not [table.name for table in metadata.sorted_tables if HISTORY_PARTITION.fullmatch(table.name)]
