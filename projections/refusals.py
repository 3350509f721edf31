"""What PostgreSQL refuses of the feed: found by halves, and bounded.

A refused batch is tried again in halves, and each try is taken back, so that nothing happens before all is known: which
records are refused, each tried alone, and that the rest is taken as one piece. A record costs at most two tries for
each halving, and a batch that is refused throughout costs hardly more than one record, because the search gives up.

It gives up where so much is refused that it cannot be about single records: a constraint that somebody added, a column
that was changed. Such records are as good as any, and the dead letters are no place for a whole feed.

Pure: imports neither faust, asyncio, asyncpg nor os.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from typing import Final, NamedTuple

from msgspec.structs import replace

from pipeline.errors import RowsRefused
from projections.feed import FeedBatch, FeedRecord, decode_feed

#: So many records of a partition may be refused at once. Some bad files come together (one producer, one folder), and
#: finding so many in a full batch takes a few seconds.
REFUSALS_MAX: Final = 16

#: So many accepted changes earn one more refusal. Without it batches of one record each would let everything through.
CHANGES_PER_REFUSAL: Final = 100

#: Writes a piece of the feed and takes it back: what PostgreSQL says where it refuses it, None where it takes it.
Attempt = Callable[[FeedBatch], Awaitable[str | None]]


class Refusal(NamedTuple):
    """A record that is refused alone, and what PostgreSQL says of it."""

    record: FeedRecord
    error: str


class Sifted(NamedTuple):
    """A piece of the feed taken apart: what is refused, in order, and the rest, which is accepted as one piece.

    The rest has the next input offset of the whole piece: the watermark passes what is refused.
    """

    refused: list[Refusal]
    rest: FeedBatch


class Allowance:
    """How many records of one partition may be refused before the partition stops."""

    def __init__(self) -> None:
        self._changes = REFUSALS_MAX * CHANGES_PER_REFUSAL

    @property
    def left(self) -> int:
        """The refusals that are left."""
        return self._changes // CHANGES_PER_REFUSAL

    def earn(self, accepted: int) -> None:
        """Count changes that were accepted."""
        self._changes = min(self._changes + accepted, REFUSALS_MAX * CHANGES_PER_REFUSAL)

    def spend(self, refused: int) -> None:
        """Count records that were refused; there must be so many left."""
        assert refused <= self.left
        self._changes -= refused * CHANGES_PER_REFUSAL


async def sift(records: Sequence[FeedRecord], error: str, attempt: Attempt, refusals_max: int) -> Sifted:
    """Take apart consecutive records that PostgreSQL refuses together.

    Args:
        records: the records, at least one.
        error: what PostgreSQL said of them.
        attempt: tries a piece of them.
        refusals_max: give up where more are refused.

    Raises:
        RowsRefused: more are refused than that; or each is accepted alone, or all but the refused ones are not
            accepted together, so that it is not about single records.
    """
    search = _Search(records, attempt, refusals_max)
    await search.halve(0, len(records), error)
    if not search.found:
        raise RowsRefused(
            f"PostgreSQL refuses the records at feed offsets {records[0].offset} to {records[-1].offset} together "
            f"and takes each of them alone ({error})"
        )
    rest = replace(
        decode_feed([record for place, record in enumerate(records) if place not in search.found]),
        next_input_offset=decode_feed(records).next_input_offset,
    )
    error_of_rest = await attempt(rest)
    if error_of_rest is not None:
        raise RowsRefused(
            f"PostgreSQL refuses {_count(len(search.found))} from feed offset {records[min(search.found)].offset} on, "
            f"each by itself, and what is left without them ({error_of_rest})"
        )
    return Sifted([Refusal(records[place], error) for place, error in search.found.items()], rest)


class _Search:
    """The search for those of `records` that are refused alone; `found` has what PostgreSQL says by their place."""

    def __init__(self, records: Sequence[FeedRecord], attempt: Attempt, refusals_max: int) -> None:
        self._records = records
        self._attempt = attempt
        self._refusals_max = refusals_max
        self.found: dict[int, str] = {}

    async def halve(self, start: int, end: int, error: str) -> None:
        """Search a piece that is refused as a whole; one record was tried alone."""
        if end - start == 1:
            self.found[start] = error
            if len(self.found) > self._refusals_max:
                raise self._too_many()
            return
        middle = (start + end) // 2
        left = await self._try(start, middle)
        if left is not None:
            await self.halve(start, middle, left)
        # Where the left half is accepted it is about the right one, and a try would only say so; but a single record
        # is condemned for nothing that was said of others.
        right = error if left is None and end - middle > 1 else await self._try(middle, end)
        if right is not None:
            await self.halve(middle, end, right)

    async def _try(self, start: int, end: int) -> str | None:
        return await self._attempt(decode_feed(self._records[start:end]))

    def _too_many(self) -> RowsRefused:
        first = min(self.found)
        return RowsRefused(
            f"PostgreSQL refuses too many changes for it to be about single ones: {_count(len(self.found))} or more "
            f"where {self._refusals_max} are allowed, the first at feed offset {self._records[first].offset} "
            f"({self.found[first]}). Nothing of the batch was written. Mend the tables, and the partition goes on by "
            f"itself; or start the projector again, and {REFUSALS_MAX} more may become dead letters"
        )


def _count(records: int) -> str:
    return "1 record" if records == 1 else f"{records} records"
