"""Projection `file_history`: every outcome, append-only.

Pure: imports neither faust, asyncio, asyncpg nor os.
"""

from __future__ import annotations

from datetime import datetime
from typing import Any, Final

from pipeline.events import EventFacts
from projections.feed import FeedBatch

#: The name of this projection in the watermarks.
NAME: Final = "file_history"

#: The columns of the tuples that `rows` returns, in their order.
COLUMNS: Final = (
    "input_partition",
    "input_offset",
    "uri",
    "namespace",
    "event_id",
    "op",
    "outcome",
    "version",
    "digest",
    "size",
    "occurred_at",
    "recorded_at",
    "projected_at",
    "reason",
)

_NOTHING: Final = EventFacts(
    event_id=None, op=None, namespace=None, occurred_at=None, digest=None, size=None, workflow_id=None
)


def rows(batch: FeedBatch, partition: int, projected_at: datetime) -> list[tuple[Any, ...]]:
    """Return one row for each change of `batch`, with what the event said and what came of it.

    A committed event became the state, so the state tells it; every other change brings the event's own words.
    """
    result: list[tuple[Any, ...]] = []
    row: tuple[Any, ...]
    for key, change in zip(batch.keys, batch.changes, strict=True):
        state = change.state
        event = change.event
        # Both shapes are written out: a common one would cost another object for each change.
        if event is None and state is not None:
            row = (
                partition,
                change.input_offset,
                key.decode(),
                state.namespace,
                state.event_id,
                state.op,
                change.outcome,
                state.version,
                None if state.deleted else state.digest,
                state.size,
                state.occurred_at,
                change.recorded_at,
                projected_at,
                change.reason,
            )
        else:
            told = event or _NOTHING
            row = (
                partition,
                change.input_offset,
                key.decode(),
                told.namespace,
                told.event_id,
                told.op,
                change.outcome,
                None if state is None else state.version,
                told.digest,
                told.size,
                told.occurred_at,
                change.recorded_at,
                projected_at,
                change.reason,
            )
        result.append(row)
    return result
