"""Where the projections stand: the arithmetic of the watermarks.

All projections of a partition move together, in one transaction, so they stand at the same feed offset. Where they do
not, one of them is new or has been tampered with, and it has to be rebuilt before the partition can go on.

Pure: imports neither faust, asyncio, asyncpg nor os.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from pipeline.errors import PositionLost
from projections import activity, contents, file_history, files

#: Every projection that the writer keeps, by its durable name.
PROJECTIONS: Final = (files.NAME, file_history.NAME, contents.NAME, activity.NAME)


def agree(partition: int, feed_offsets: Mapping[str, int]) -> int:
    """Return the feed offset at which all projections of `partition` stand.

    Raises:
        PositionLost: they stand apart; the message names them and what helps.
    """
    assert feed_offsets.keys() == set(PROJECTIONS)
    if len(set(feed_offsets.values())) == 1:
        return feed_offsets[PROJECTIONS[0]]
    newest = max(feed_offsets.values())
    behind = sorted(name for name, offset in feed_offsets.items() if offset < newest)
    stands = ", ".join(f"{name} at {offset}" for name, offset in sorted(feed_offsets.items()))
    raise PositionLost(
        f"the projections of partition {partition} stand apart ({stands}): "
        f"{', '.join(behind)} was changed by hand or restored alone; restore the whole database, "
        "or project into an empty one (POSTGRES_DB)"
    )
