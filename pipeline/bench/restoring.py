"""The process whose restore is measured: it brings all partitions back once, and tells how that went, as JSON.

It does what a node does when it starts, without the rest of a node, so that what it grows by is the table's.
"""

from __future__ import annotations

import asyncio
import gc
import sys
import time
from contextlib import ExitStack

import msgspec
import psutil
from msgspec import Struct

from pipeline.settings import Settings, load_settings
from pipeline.topics import FILES_CHANGELOG, topic_name
from tables.changelog import restore
from tables.kinds import stores


class Restored(Struct, frozen=True):
    """What a restore came to: `seconds` from opening the stores on, `whole_seconds` of the process."""

    records: int
    keys: int
    seconds: float
    whole_seconds: float
    memory_bytes: int


async def restore_all(settings: Settings) -> Restored:
    """Restore every partition at once.

    Raises:
        StamplineError: one of them cannot be restored.
    """
    process = psutil.Process()
    begun = process.create_time()
    topic = topic_name(settings, FILES_CHANGELOG)
    with ExitStack() as stack:
        open_store = stack.enter_context(stores(settings))
        memory_bytes = process.memory_info().rss
        started = time.perf_counter()
        opened = [open_store("files", topic, number) for number in range(settings.kafka_topic_partitions)]
        for store in opened:
            stack.callback(store.close)
        counts = await asyncio.gather(*(restore(settings, topic, number, store) for number, store in enumerate(opened)))
        seconds = time.perf_counter() - started
        gc.collect()
        return Restored(
            records=sum(counts),
            seconds=seconds,
            memory_bytes=process.memory_info().rss - memory_bytes,
            # Counted and not asked for: a store on disk only estimates its length.
            keys=sum(1 for store in opened for _ in store.items()),
            whole_seconds=time.time() - begun,
        )


if __name__ == "__main__":
    # As a node does (`pipeline.worker`).
    gc.set_threshold(200_000, 20, 1000)
    sys.stdout.buffer.write(msgspec.json.encode(asyncio.run(restore_all(load_settings()))) + b"\n")
