"""Projection `activity`: how many inputs came in each minute, of which namespace and op, and what became of them.

Additive: a batch gives what it adds, so that each change must be counted exactly once. That is what the watermark is
for.

Pure: imports neither faust, asyncio, asyncpg nor os.
"""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any, Final

from pipeline.events import OUTCOMES
from projections.feed import FeedBatch
from projections.file_history import tell

#: The name of this projection in the watermarks.
NAME: Final = "activity"

#: The columns of the tuples that `rows` returns, in their order: a key of three, and what to add to each number.
COLUMNS: Final = ("minute", "namespace", "op", "events", "bytes", *OUTCOMES)

_MINUTE: Final = timedelta(minutes=1)
_LONG_AGO: Final = datetime.min.replace(tzinfo=UTC)

#: Where the numbers of a key stand: the bytes, then each outcome.
_PLACES: Final = {outcome: place for place, outcome in enumerate(OUTCOMES, 1)}


def rows(batch: FeedBatch) -> list[tuple[Any, ...]]:
    """Return what `batch` adds, one row per minute, namespace and op, sorted by these.

    The minute is that in which Kafka got the input. Namespace, op and size are those of its row in `file_history`;
    the first two are empty where they are not known there, and a size that is not known adds no bytes.
    """
    numbers: dict[tuple[datetime, str, str], list[int]] = {}
    begin = end = _LONG_AGO
    for change in batch.changes:
        recorded_at = change.recorded_at
        # Neighbours are mostly of the same minute, and comparing costs a tenth of truncating.
        if not begin <= recorded_at < end:
            begin = recorded_at.astimezone(UTC).replace(second=0, microsecond=0)
            end = begin + _MINUTE
        facts = tell(change)
        key = (begin, facts.namespace or "", facts.op or "")
        totals = numbers.get(key)
        if totals is None:
            totals = numbers[key] = [0] * (1 + len(OUTCOMES))
        totals[0] += facts.size or 0
        totals[_PLACES[change.outcome]] += 1
    return [(*key, sum(totals[1:]), *totals) for key, totals in sorted(numbers.items())]
