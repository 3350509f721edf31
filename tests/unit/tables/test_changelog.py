"""Recovery's checks of a log before it is read; what it does with records: `test_partition_stores.py`."""

from __future__ import annotations

import re

import pytest
from aiokafka.structs import ConsumerRecord

from pipeline.errors import PositionLost
from pipeline.events import PROGRESS_KEY
from tables.changelog import _check_bounds, _compare
from tables.store import Mark, MemoryStore

pytestmark = pytest.mark.unit


class FakeReader:
    """A log with two ends."""

    place = "changelog partition 3"

    def __init__(self, begin: int, end: int) -> None:
        self.begin = begin
        self.end = end

    async def require(self, position: int) -> None:
        """Do as a reader of a real log does."""
        if position > self.end:
            raise PositionLost(f"{self.place} ends at {self.end}, but was read up to {position}")


@pytest.mark.parametrize(("begin", "end", "position"), [(0, 0, 0), (5, 9, 0), (5, 9, 5), (0, 9, 9)])
async def test_a_log_that_holds_the_position_is_read(begin: int, end: int, position: int) -> None:
    """Also one whose beginning is gone, by a store that has seen nothing: it takes what there is."""
    await _check_bounds(FakeReader(begin, end), MemoryStore(position=position))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("begin", "end", "position", "why"),
    [(5, 9, 4, "offsets 4 to 4 are gone"), (0, 9, 10, "ends at 9, but was read up to 10")],
)
async def test_a_log_with_a_hole_or_without_an_end_is_refused(begin: int, end: int, position: int, why: str) -> None:
    """A store would lack what is gone, or hold what never was."""
    with pytest.raises(PositionLost, match=re.escape(why)):
        await _check_bounds(FakeReader(begin, end), MemoryStore(position=position))  # type: ignore[arg-type]


def record(offset: int, key: bytes, value: bytes) -> ConsumerRecord[bytes, bytes]:
    """Make a record."""
    return ConsumerRecord("changelog", 3, offset, 0, 0, key, value, None, 0, 0, ())


def test_another_record_at_the_same_offset_is_another_log() -> None:
    """The last progress record is compared by its bytes; where compaction has removed it, nothing can be told."""
    mark = Mark(7, b"progress")

    _compare(mark, record(7, PROGRESS_KEY, b"progress"))
    _compare(mark, record(8, b"file:///a", b"x"))

    for other in (record(7, PROGRESS_KEY, b"other"), record(7, b"file:///a", b"progress")):
        with pytest.raises(PositionLost, match="changelog partition 3 offset 7 is not the record that was read there"):
            _compare(mark, other)
