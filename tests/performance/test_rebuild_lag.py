"""A rebuild leaves the live projections their freshness: measured at a constant load, before and during it."""

from __future__ import annotations

import asyncio
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from threading import Event, Thread
from typing import Final

import pytest

from pipeline.bench.load import Load, file_events
from pipeline.client import EventProducer, Position
from pipeline.events import FileEvent
from pipeline.settings import Settings
from pipeline.topics import create_topics
from tests.fix_road import Road, ending
from tests.fix_services import MakeSettings

pytestmark = [
    pytest.mark.performance,
    pytest.mark.timeout(600),
    pytest.mark.skipif(shutil.which("java") is None, reason="measured on Apache Kafka, which needs Java"),
]

#: Events that the feed has before, files that they are about, events a second meanwhile, and s that is measured before.
_FED: Final = 100_000
_URIS: Final = 20_000
_RATE: Final = 2_000
_BEFORE_SECONDS: Final = 20.0
#: The promise: so many times the lag at most.
_TIMES_MAX: Final = 2.0

#: From Kafka's clock to the projector's, of what was projected between two moments: events a second, p50 and p99 in ms.
_LAG: Final = """
SELECT count(*) / extract(epoch FROM $2::timestamptz - $1::timestamptz)::double precision,
       percentile_cont(0.5) WITHIN GROUP (ORDER BY extract(epoch FROM projected_at - recorded_at) * 1000),
       percentile_cont(0.99) WITHIN GROUP (ORDER BY extract(epoch FROM projected_at - recorded_at) * 1000)
FROM file_history WHERE projected_at BETWEEN $1 AND $2
"""


async def test_a_rebuild_does_not_slow_the_live_projections(
    make_settings: MakeSettings, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """At 2,000 events a second the p99 of the lag during a rebuild of `files` and `contents` is at most twice that
    before it.
    """
    settings = make_settings()
    await create_topics(settings)
    events = list(file_events(Load(_FED + 120 * _RATE, _URIS)))
    with ending(Road(settings, tmp_path)) as road:
        for role in ("hasher", "reducer", "projector"):
            road.start(role)
        await road.until_visible(await road.send(events[:_FED]))
        with constant_load(settings, events[_FED:]):
            begin = await reach_rate(road)
            await asyncio.sleep(_BEFORE_SECONDS)
            end = datetime.now(UTC)
            before = (await road.fetch(_LAG, begin, end))[0]
            begin = datetime.now(UTC)
            for name in ("files", "contents"):
                node = road.launch("pipeline", "projections", "rebuild", name)
                await road.until(lambda: node.process.poll() is not None)  # noqa: B023 - waited for in this round
            end = datetime.now(UTC)
        during = (await road.fetch(_LAG, begin, end))[0]
        assert [node.process.returncode for node in road.nodes[3:]] == [0, 0]
    with capsys.disabled():
        for when, (rate, median, p99) in (("before", before), ("during", during)):
            sys.stdout.write(f"\n{when} the rebuild: {rate:.0f} events/s, lag p50 {median:.1f} ms, p99 {p99:.1f} ms")
        sys.stdout.write(f"\nthe rebuild of files and contents took {(end - begin).total_seconds():.1f} s\n")

    assert during[2] <= _TIMES_MAX * before[2]


async def reach_rate(road: Road) -> datetime:
    """Wait until the projector keeps up with the load, and return that moment."""
    caught_up = "SELECT coalesce(max(lag_ms), 0) FROM projection_lag WHERE status <> 'rebuilding'"
    seen = "SELECT count(*) FROM file_history WHERE projected_at > now() - interval '2 seconds'"

    async def steady() -> bool:
        return bool((await road.fetch(caught_up))[0][0] < 1000 and (await road.fetch(seen))[0][0] > _RATE)

    await road.until(steady)
    return datetime.now(UTC)


@contextmanager
def constant_load(settings: Settings, events: list[FileEvent]) -> Iterator[None]:
    """Send so many events a second from a thread until the block ends."""
    ended = Event()
    thread = Thread(target=lambda: asyncio.run(_send(settings, events, ended)))
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


async def _send(settings: Settings, events: list[FileEvent], ended: Event) -> list[Position]:
    started = time.monotonic()
    sent: list[Position] = []
    async with EventProducer(settings) as producer:
        while not ended.is_set() and len(sent) < len(events):
            due = int((time.monotonic() - started) * _RATE)
            if len(sent) < due:
                sent += await producer.send_all(events[len(sent) : due])
            await asyncio.sleep(0.01)
    return sent
