"""The search for what PostgreSQL refuses, as control flow: which records, how many tries, and when it gives up."""

from __future__ import annotations

import math
from collections.abc import Set as AbstractSet

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.errors import RowsRefused
from projections.feed import FeedBatch, decode_feed
from projections.refusals import CHANGES_PER_REFUSAL, REFUSALS_MAX, Allowance, Sifted, sift
from tests.projection_samples import Record, make_commit, make_progress, make_records

pytestmark = pytest.mark.unit

FIRST_OFFSET = 1000


class FakeServer:
    """Refuses every piece that holds one of these inputs, and remembers what was tried."""

    def __init__(self, poison: AbstractSet[int]) -> None:
        self.poison = poison
        self.tried: list[list[int]] = []

    async def attempt(self, piece: FeedBatch) -> str | None:
        """Say of the first refused input what is wrong with it."""
        inputs = [change.input_offset for change in piece.changes]
        self.tried.append(inputs)
        return next((f"input {each} is refused" for each in inputs if each in self.poison), None)


def make_feed(length: int) -> list[Record]:
    """Make records of as many inputs, and the progress that ends their transaction."""
    records = make_records(*((f"f{each}", make_commit(each)) for each in range(length)), first_offset=FIRST_OFFSET)
    return [*records, make_progress(length + 7, FIRST_OFFSET + length)]


async def sift_at(server: FakeServer, records: list[Record], refusals_max: int = REFUSALS_MAX) -> Sifted:
    """Take records apart that were refused by the write of the whole."""
    error = await server.attempt(decode_feed(records))
    assert error is not None
    server.tried.clear()
    return await sift(records, error, server.attempt, refusals_max)


@given(st.data())
async def test_exactly_the_refused_records_are_found(data: st.DataObject) -> None:
    """Wherever they stand, the refused ones come out in order, each tried alone, and all others are left in order."""
    length = data.draw(st.integers(1, 300))
    poison = data.draw(st.sets(st.integers(0, length - 1), min_size=1, max_size=REFUSALS_MAX))
    records = make_feed(length)
    server = FakeServer(poison)

    sifted = await sift_at(server, records)

    assert [refusal.record.offset - FIRST_OFFSET for refusal in sifted.refused] == sorted(poison)
    assert [refusal.error for refusal in sifted.refused] == [f"input {each} is refused" for each in sorted(poison)]
    left = [each for each in range(length) if each not in poison]
    assert [change.input_offset for change in sifted.rest.changes] == left
    assert sifted.rest.keys == [f"f{each}".encode() for each in left]
    assert sifted.rest.next_input_offset == length + 7
    assert all([each] in server.tried for each in poison)
    *halves, last = server.tried
    assert all(piece == list(range(piece[0], piece[-1] + 1)) for piece in halves if piece), "a piece has a hole"
    assert last == left, "the rest was not tried as a whole"
    assert len(server.tried) <= 2 * len(poison) * math.ceil(math.log2(length + 1)) + 1


@given(poison=st.sets(st.integers(0, 199), min_size=4))
async def test_too_many_are_a_fault_of_the_tables(poison: set[int]) -> None:
    """Past the bound the search ends, with the first refused record and what PostgreSQL said of it."""
    server = FakeServer(poison)

    with pytest.raises(RowsRefused, match=rf"first at feed offset {FIRST_OFFSET + min(poison)} .input {min(poison)} "):
        await sift_at(server, make_feed(200), refusals_max=3)

    assert len(server.tried) <= 2 * 4 * math.ceil(math.log2(201))


async def test_a_batch_refused_throughout_costs_little() -> None:
    """Where every record is refused the search goes down once and looks at as many records as are allowed."""
    server = FakeServer(range(8000))  # type: ignore[arg-type] # as good as a set to look into

    with pytest.raises(RowsRefused, match="too many changes"):
        await sift_at(server, make_feed(8000))

    assert len(server.tried) <= math.ceil(math.log2(8001)) + 2 * (REFUSALS_MAX + 1)
    assert sum(map(len, server.tried)) <= 2 * 8000


async def test_nothing_is_allowed_where_nothing_is_left() -> None:
    """A partition that has used up its allowance stops at the first refused record."""
    with pytest.raises(RowsRefused, match=f"where 0 are allowed, the first at feed offset {FIRST_OFFSET + 2} "):
        await sift_at(FakeServer({2}), make_feed(5), refusals_max=0)


async def test_a_piece_that_is_refused_only_as_a_whole_stops_the_partition() -> None:
    """Where each record is accepted alone, none is to blame."""

    async def attempt(piece: FeedBatch) -> str | None:
        return "together" if len(piece.changes) > 1 else None

    with pytest.raises(RowsRefused, match="together and takes each of them alone"):
        await sift(make_feed(6), "together", attempt, REFUSALS_MAX)


async def test_the_rest_is_made_sure_of() -> None:
    """Where the rest is refused too, nothing is reported as refused: its dead letter would come again and again."""

    async def attempt(piece: FeedBatch) -> str | None:
        inputs = {change.input_offset for change in piece.changes}
        return "refused" if 0 in inputs or inputs >= {2, 5} else None

    with pytest.raises(RowsRefused, match="1 record from feed offset 1000 on, each by itself, and what is left"):
        await sift(make_feed(6), "refused", attempt, REFUSALS_MAX)


async def test_progress_and_tombstones_are_records_too() -> None:
    """A record that brings no row can still be refused, for what it says of the watermark."""
    records = [*make_records(("a", make_commit(1))), Record(b"a", None, 1), make_progress(2**63, 2)]

    async def attempt(piece: FeedBatch) -> str | None:
        return "out of range" if (piece.next_input_offset or 0) >= 2**63 else None

    with pytest.raises(RowsRefused, match="from feed offset 2 on"):
        await sift(records, "out of range", attempt, REFUSALS_MAX)


def test_accepted_changes_earn_refusals_up_to_the_bound() -> None:
    """What is spent comes back with the changes that are accepted, and never more than that."""
    allowance = Allowance()
    assert allowance.left == REFUSALS_MAX

    allowance.earn(10**6)
    assert allowance.left == REFUSALS_MAX

    allowance.spend(REFUSALS_MAX)
    allowance.earn(CHANGES_PER_REFUSAL - 1)
    assert allowance.left == 0

    allowance.earn(1)
    assert allowance.left == 1
