"""Projection `files`: the current state of each file, one row per uri.

Pure: imports neither faust, asyncio, asyncpg nor os.
"""

from __future__ import annotations

from typing import Any, Final

from blake3 import blake3

from pipeline.events import FileState
from projections.feed import FeedBatch

#: The name of this projection in the watermarks.
NAME: Final = "files"

#: The columns of the tuples that `rows` returns, in their order. The partition and the time of the projection are the
#: same for a whole batch and given to the statement: a timestamp is the dearest of all values to send.
COLUMNS: Final = (
    "uri_key",
    "version",
    "size",
    "occurred_at",
    "stamped_at",
    "input_offset",
    "deleted",
    "uri",
    "namespace",
    "op",
    "event_id",
    "digest",
    "workflow_id",
    "metadata",
)

_KEY_BYTES: Final = 16


def rows(batch: FeedBatch) -> list[tuple[Any, ...]]:
    """Return the newest state of each file in `batch`, one row per file.

    A file that never came to a version (all its events were rejected or are waiting) is not shown. The outcome of the
    change does not matter: compaction may have left only a late `unchanged` of a file, and that carries its state too.
    """
    newest: dict[bytes, FileState] = {}
    for key, change in zip(batch.keys, batch.changes, strict=True):
        state = change.state
        if state is not None and state.version > 0:
            newest[key] = state
    return [
        (
            uri_key(key),
            state.version,
            state.size,
            state.occurred_at,
            state.stamped_at,
            state.input_offset,
            state.deleted,
            key.decode(),
            state.namespace,
            state.op,
            state.event_id,
            None if state.deleted else state.digest,
            state.workflow_id,
            None if state.metadata is None else state.metadata.decode(),
        )
        for key, state in newest.items()
    ]


def uri_key(uri: bytes) -> str:
    """Return the primary key of a file, a UUID in hex: the first 16 bytes of the BLAKE3 digest of its uri.

    The uri itself may be longer than PostgreSQL allows for an index entry.
    """
    return blake3(uri).hexdigest(_KEY_BYTES)
