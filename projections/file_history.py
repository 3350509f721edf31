"""Projection `file_history`: every outcome, append-only.

Pure: imports neither faust, asyncio, asyncpg nor os.
"""

from __future__ import annotations

from datetime import datetime
from typing import Any, Final

from pipeline.events import Change, EventFacts, FileState
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
    """Return one row for each change of `batch`, with what the event said and what came of it."""
    result: list[tuple[Any, ...]] = []
    for key, change in zip(batch.keys, batch.changes, strict=True):
        state = change.state
        facts = tell(change)
        result.append(
            (
                partition,
                change.input_offset,
                key.decode(),
                facts.namespace,
                facts.event_id,
                facts.op,
                change.outcome,
                None if state is None else state.version,
                None if state is not None and state is facts and state.deleted else facts.digest,
                facts.size,
                facts.occurred_at,
                change.recorded_at,
                projected_at,
                change.reason,
            )
        )
    return result


def tell(change: Change) -> FileState | EventFacts:
    """Return what tells of the event of a change.

    A committed event became the state, so the state tells it; every other change brings the event's own words.
    """
    event = change.event
    if event is not None:
        return event
    state = change.state
    return _NOTHING if state is None else state
