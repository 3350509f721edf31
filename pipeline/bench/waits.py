"""How long one waits for one's own write: `stampline bench --wait`.

Events are sent one by one, at a steady rate that is far below what the chain can do, and for each one the sender waits
until it is visible in PostgreSQL, as a program does that reads its own write. The time counts from the call that sends
to the answer `reached`; an event that is not reached is an error.
"""

from __future__ import annotations

import asyncio
import math
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from msgspec import Struct

from pipeline.bench.load import CONTENT_BYTES, Load, file_events
from pipeline.bench.meter import foreign_seconds, run_processes
from pipeline.bench.run import Say, find_site, find_versions, keep_logs, machine
from pipeline.bench.systems import Chain, Site
from pipeline.client import EventProducer
from pipeline.errors import StamplineError
from pipeline.events import FileEvent

_URIS: Final = 1000
#: Events that wait for the chain when it starts, and how long events are sent before the measurement, in s, so that all
#: of it is warm then.
_BACKLOG_EVENTS: Final = 2000
_WARM_SECONDS: Final = 2
#: Longest wait for one event, in s; the first one waits for the processes too.
_WAIT_SECONDS_MAX: Final = 30.0
_START_SECONDS_MAX: Final = 90.0


@dataclass(frozen=True, slots=True)
class WaitPlan:
    """How many events a second, and for how many seconds."""

    rate: int = 500
    seconds: int = 10


class WaitReport(Struct, frozen=True):
    """What was found out. Times are in ms; `sent` is from the call until Kafka has the event, `reached` until visible.

    `events_per_second` is the rate of the calls, as it came about; `foreign_load_percent` is what others took of the
    machine meanwhile, None = not known.
    """

    machine: dict[str, str | int]
    versions: dict[str, str]
    partitions: int
    content_bytes: int
    events: int
    events_per_second: float
    sent_ms_p50: float
    sent_ms_p99: float
    reached_ms_p50: float
    reached_ms_p99: float
    reached_ms_max: float
    foreign_load_percent: float | None


@dataclass(frozen=True, slots=True)
class _Timed:
    called_at: float
    sent_ms: float
    reached_ms: float


async def run_waits(plan: WaitPlan, say: Say) -> WaitReport:
    """Measure the waits of one chain.

    Raises:
        StamplineError: an event was not reached; names the logs.
        ServiceUnavailable: a service does not start or does not answer.
    """
    with keep_logs() as logs, find_site(say) as site:
        async with Chain(site, Load(_BACKLOG_EVENTS, _URIS)) as chain:
            with run_processes(chain.stages(), logs) as running:
                pids = [process.pid for process in running.values()]
                pids += [pid for pid in site.pids.values() if pid is not None]
                async with EventProducer(chain.settings) as producer:
                    try:
                        return await _measure(plan, producer, site, pids, say)
                    except StamplineError as exc:
                        raise StamplineError(f"{exc}; the logs: {logs}") from exc


async def _measure(plan: WaitPlan, producer: EventProducer, site: Site, pids: Sequence[int], say: Say) -> WaitReport:
    # No seed twice: an event that was sent before is a duplicate.
    first, *warming = file_events(Load(1 + _WARM_SECONDS * plan.rate, _uris(_WARM_SECONDS * plan.rate), seed=8))
    say("waiting for the first event")
    await _send_and_wait(producer, first, _START_SECONDS_MAX)
    await _send_steadily(producer, warming, plan.rate)
    events = list(file_events(Load(plan.seconds * plan.rate, _uris(plan.seconds * plan.rate), seed=9)))
    say(f"sending {plan.rate} events a second for {plan.seconds} s")
    before, started = foreign_seconds(pids), time.perf_counter()
    timed = await _send_steadily(producer, events, plan.rate)
    seconds = time.perf_counter() - started
    load = max(0.0, foreign_seconds(pids) - before) / seconds / (os.cpu_count() or 1)
    sent = sorted(times.sent_ms for times in timed)
    reached = sorted(times.reached_ms for times in timed)
    return WaitReport(
        machine=machine(),
        versions=await find_versions(site, say),
        partitions=site.settings.kafka_topic_partitions,
        content_bytes=CONTENT_BYTES,
        events=len(events),
        events_per_second=round((len(timed) - 1) / (timed[-1].called_at - timed[0].called_at), 1),
        sent_ms_p50=_percentile(sent, 0.50),
        sent_ms_p99=_percentile(sent, 0.99),
        reached_ms_p50=_percentile(reached, 0.50),
        reached_ms_p99=_percentile(reached, 0.99),
        reached_ms_max=round(reached[-1], 1),
        foreign_load_percent=None if None in site.pids.values() else round(load * 100, 1),
    )


def _uris(events: int) -> int:
    return min(_URIS, events)


async def _send_steadily(producer: EventProducer, events: Sequence[FileEvent], rate: int) -> list[_Timed]:
    """Send the events at this rate, whatever becomes of those before, and wait for each."""
    loop = asyncio.get_running_loop()
    began = loop.time()
    async with asyncio.TaskGroup() as group:
        tasks = []
        for number, event in enumerate(events):
            await asyncio.sleep(began + number / rate - loop.time())
            tasks.append(group.create_task(_send_and_wait(producer, event, _WAIT_SECONDS_MAX)))
    return [task.result() for task in tasks]


async def _send_and_wait(producer: EventProducer, event: FileEvent, timeout_seconds: float) -> _Timed:
    called = time.perf_counter()
    token = await producer.send(event)
    sent = time.perf_counter()
    answer = await producer.wait(token, timeout_seconds)
    reached = time.perf_counter()
    if answer.verdict != "reached":
        raise StamplineError(f"event {token} was not reached: {answer.verdict} {answer.reason or ''}".rstrip())
    return _Timed(called, (sent - called) * 1000, (reached - called) * 1000)


def _percentile(values: Sequence[float], share: float) -> float:
    """Return the least of the sorted values that is not exceeded by this share of them."""
    return round(values[math.ceil(share * len(values)) - 1], 1)
