"""Changes, states and feed records for tests, with every field that a test does not care about filled in."""

from __future__ import annotations

import random
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

from pipeline.events import PROGRESS_KEY, Change, EventFacts, FileState, Progress, encode_record
from projections.feed import FeedBatch

NOON = datetime(2026, 11, 23, 12, tzinfo=UTC)


@dataclass(frozen=True)
class Record:
    """A record of the changelog as a consumer hands it over."""

    key: bytes | None
    value: bytes | None
    offset: int


def instant(input_offset: int) -> datetime:
    """When the input at this offset came to Kafka: one each second."""
    return NOON + timedelta(seconds=input_offset)


def make_state(input_offset: int, **fields: Any) -> FileState:
    """Make the state after a commit of the input at `input_offset`."""
    defaults: dict[str, Any] = {
        "version": 1,
        "digest": bytes([input_offset % 256]) * 32,
        "size": 100 + input_offset,
        "op": "modified",
        "deleted": False,
        "namespace": "default",
        "occurred_at": instant(input_offset) - timedelta(seconds=2),
        "stamped_at": instant(input_offset) + timedelta(milliseconds=3),
        "event_id": f"event-{input_offset}",
        "workflow_id": None,
        "metadata": None,
        "input_offset": input_offset,
    }
    return FileState(**{**defaults, **fields})


def make_commit(input_offset: int, **fields: Any) -> Change:
    """Make the change of a committed input; `fields` are those of its state."""
    state = make_state(input_offset, **fields)
    return Change(outcome="committed", input_offset=input_offset, recorded_at=instant(input_offset), state=state)


def make_refusal(input_offset: int, state: FileState | None, **fields: Any) -> Change:
    """Make the change of an input that did not become the state, by default a conflict."""
    event = EventFacts(
        event_id=f"event-{input_offset}",
        op="created",
        namespace="other",
        occurred_at=instant(input_offset) - timedelta(seconds=9),
        digest=b"\xee" * 32,
        size=9,
        workflow_id=None,
    )
    defaults: dict[str, Any] = {
        "outcome": "conflict",
        "input_offset": input_offset,
        "recorded_at": instant(input_offset),
        "state": state,
        "event": event,
    }
    return Change(**{**defaults, **fields})


def make_batch(*changes: tuple[str, Change]) -> FeedBatch:
    """Make a batch from pairs of uri and change."""
    next_input_offset = changes[-1][1].input_offset + 1 if changes else None
    return FeedBatch([uri.encode() for uri, _ in changes], [change for _, change in changes], next_input_offset)


def make_records(*changes: tuple[str, Change], first_offset: int = 0) -> list[Record]:
    """Encode pairs of uri and change as the reducer writes them."""
    return [
        Record(uri.encode(), encode_record(change), offset)
        for offset, (uri, change) in enumerate(changes, first_offset)
    ]


def make_progress(next_input_offset: int, offset: int) -> Record:
    """Make the record that ends a transaction of the reducer."""
    value = encode_record(Progress(next_input_offset=next_input_offset, outcomes={}))
    return Record(PROGRESS_KEY, value, offset)


def make_feed(seed: int, length: int = 60) -> list[tuple[str, Change]]:
    """Make a feed of a few files with every kind of change, the same for the same seed."""
    draw = random.Random(seed)
    states: dict[str, Any] = {}
    feed: list[tuple[str, Change]] = []
    for offset in range(length):
        uri = draw.choice("abcdef")
        state = states.get(uri)
        if state is None or draw.random() < 0.6:
            version = 1 if state is None else state.version + 1
            change = make_commit(offset, version=version, deleted=draw.random() < 0.2)
            states[uri] = change.state
        else:
            change = make_refusal(offset, state)
        feed.append((uri, change))
    return feed
