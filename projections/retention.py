"""Dropping what is old from the history: whole months, which takes a moment however many rows they have."""

from __future__ import annotations

from datetime import datetime
from typing import Final

from pipeline.errors import BatchAborted, ServiceUnavailable
from pipeline.postgres import PostgresConnectionManager
from projections.queries import query

#: Longest wait for projectors and readers to leave the history for a moment, in ms: others wait behind us.
_WAIT_MS: Final = 1000
_TRIES: Final = 10


async def drop_history(manager: PostgresConnectionManager, before: datetime, *, dry_run: bool = False) -> list[str]:
    """Drop the months of `file_history` that end at `before` or earlier; return their tables.

    What is dropped is remembered by the offsets of its inputs, so that `stampline verify` and `wait_for` do not take it
    for lost. The versions of files, `contents` and `activity` keep what they have counted.

    Args:
        manager: connections to PostgreSQL.
        before: a moment with a time zone.
        dry_run: only tell what would be dropped.

    Raises:
        ServiceUnavailable: somebody used the history all the time.
        SettingsError: as `PostgresConnectionManager.connection`.
    """
    for tries_left in reversed(range(_TRIES)):
        try:
            async with manager.connection() as connection, connection.transaction(isolation="read_committed"):
                if dry_run:
                    rows = await connection.fetch(query("old_history"), before)
                else:
                    await connection.execute(f"SET LOCAL lock_timeout = {_WAIT_MS}")
                    rows = await connection.fetch(query("drop_history"), before)
        except BatchAborted as exc:
            if not tries_left:
                raise ServiceUnavailable(
                    f"the history was in use all the time ({exc}): try it again when less goes on"
                ) from exc
        else:
            return [row["name"] for row in rows]
    raise AssertionError("the last try returns or raises")
