"""Recovery: brings a partition's store up to the end of its changelog, in batches of committed records."""

from __future__ import annotations

from typing import Any

import msgspec

from pipeline.errors import PositionLost, RecoveryFailed
from pipeline.events import PROGRESS_KEY, Progress, decode_change, decode_progress
from pipeline.logreader import LogReader
from pipeline.settings import Settings
from tables.files import resume
from tables.store import PartitionStore


async def restore(
    settings: Settings, topic: str, partition: int, store: PartitionStore, *, until: int | None = None
) -> int:
    """Read a changelog from the store's position to its end (or to offset `until`) into the store.

    Returns:
        How many records were read.

    Raises:
        RecoveryFailed: the changelog is shorter than what the store has seen, or a record cannot be read.
        ServiceUnavailable: Kafka does not answer.
    """
    count = 0
    tail: list[bytes] = []
    values = store.values
    async with LogReader(settings, topic, partition) as reader:
        try:
            async for records in reader.read(store.position, until):
                count += len(records)
                for record in records:
                    if record.key == PROGRESS_KEY:
                        store.progress = _progress(record)
                        tail.clear()
                    elif record.value is None:
                        values.pop(record.key, None)
                    else:
                        values[record.key] = record.value
                        tail.append(record.value)
        except PositionLost as exc:
            raise RecoveryFailed(f"{exc}: the topic was made anew; restart this node to read it as it is") from exc
        store.position = reader.position
    if tail:
        store.progress = resume(store.progress, [decode_change(value) for value in tail])
    return count


def _progress(record: Any) -> Progress:
    try:
        return decode_progress(record.value or b"")
    except msgspec.DecodeError as exc:
        raise RecoveryFailed(
            f"{record.topic} partition {record.partition} offset {record.offset} is no progress record ({exc}): "
            "was it written by a newer version? Run that one"
        ) from exc
