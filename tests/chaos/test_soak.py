"""The soak: hours of constant events must not make memory, file descriptors, threads, tasks or topics grow.

SOAK_MINUTES and SOAK_RATE (events/s) choose the long run (`make soak`); SOAK_REPORT names a file for its report.
Growth by design, and only reported: `file-events`, `file-stamps` and the history keep one record per event.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import re
import statistics
import time
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Final, NamedTuple

import psutil
import pytest

from migrations.run import upgrade
from pipeline.client import EventProducer
from pipeline.embedded import run_services
from pipeline.events import FileEvent
from pipeline.settings import Settings
from pipeline.topics import create_topics
from pipeline.verify import all_faults, verify
from pipeline.worker import ROLES
from tests.chaos.soaking_node import EVENT
from tests.fix_road import NodeProcess, Road, ending
from tests.fix_services import make_settings_for

MINUTES: Final = float(os.environ.get("SOAK_MINUTES", "60"))
EVENTS_PER_SECOND: Final = float(os.environ.get("SOAK_RATE", "3000"))

PRODUCER: Final = "producer (the test)"
BROKER: Final = "Kafka"
INTERNAL_TOPICS: Final = ("__consumer_offsets", "__transaction_state")
_PARTITIONS: Final = 8
_URIS: Final = 20_000
_CONTENT_BYTES: Final = 64
_PORTIONS_PER_SECOND: Final = 10
#: Longest until all is visible once the producer has stopped, in s.
_CATCH_UP_SECONDS_MAX: Final = 120.0
#: How many more there may be in the end than at most during the warm-up.
_MORE_MAX: Final = {"fds": 8, "threads": 4, "tasks": 32}
_INTERNAL_MIB_MAX: Final = 256.0
_MIB: Final = 2.0**20
_HOUR: Final = 3600.0
#: The end, and the end of the warm-up, are medians of so many samples.
_LAST: Final = 5


@dataclass(frozen=True)
class Plan:
    """How long, how much, and what counts as growth: in MiB after the warm-up, and in MiB/h."""

    seconds: float
    warm_seconds: float
    sample_seconds: float
    events_per_second: float
    growth_mib_max: float | None = None
    slope_mib_max: float | None = None


class Point(NamedTuple):
    """A number at a time, in s."""

    at: float
    value: float


class Producer:
    """Sends events at a constant rate, each a new version of a file out of a bounded set."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._chance = random.Random(4)
        self.events = 0
        #: The next offset of each partition after what Kafka has acknowledged.
        self.sent: Counter[int] = Counter()
        #: How late a portion was at most, in s.
        self.late_max = 0.0

    async def run(self, settings: Settings) -> None:
        """Send everything; a portion that is late does not put off those after it."""
        size = round(self._plan.events_per_second / _PORTIONS_PER_SECOND)
        async with EventProducer(settings) as producer:
            begun = time.monotonic()
            for number in range(round(self._plan.seconds * _PORTIONS_PER_SECOND)):
                due = begun + number / _PORTIONS_PER_SECOND
                await asyncio.sleep(max(0.0, due - time.monotonic()))
                self.late_max = max(self.late_max, time.monotonic() - due)
                for partition, offset in await producer.send_all(self._make_portion(size)):
                    self.sent[partition] = max(self.sent[partition], offset + 1)
                self.events += size

    def _make_portion(self, size: int) -> list[FileEvent]:
        now = datetime.now(UTC)
        return [
            FileEvent(
                event_id=f"{number:032x}",
                uri=f"file:///soaked/{self._chance.randrange(_URIS)}.bin",
                op="modified",
                occurred_at=now,
                content=number.to_bytes(8, "big") + self._chance.randbytes(_CONTENT_BYTES - 8),
            )
            for number in range(self.events, self.events + size)
        ]


@dataclass
class Watch:
    """Looks at everything from outside, and keeps what it saw: by process and kind, by topic, and as a whole."""

    road: Road
    nodes: Mapping[str, NodeProcess]
    producer: Producer
    processes: Mapping[str, psutil.Process]
    #: Kafka's folder of logs.
    logs: Path
    seen: dict[str, dict[str, list[Point]]] = field(default_factory=lambda: defaultdict(lambda: defaultdict(list)))
    topics: dict[str, list[Point]] = field(default_factory=lambda: defaultdict(list))
    whole: dict[str, list[Point]] = field(default_factory=lambda: defaultdict(list))

    async def run(self, seconds: float) -> None:
        """Take samples until cancelled."""
        while True:
            self.check()
            await self._look()
            await asyncio.sleep(seconds)

    def check(self) -> None:
        """Fail where a node has ended."""
        for role, node in self.nodes.items():
            assert node.process.poll() is None, f"{role} has ended\n{node.log.read_text(errors='replace')[-3000:]}"

    async def lag(self) -> float:
        """Return how many events Kafka has that cannot be seen yet."""
        [row] = await self.road.fetch(
            "SELECT coalesce(sum(at), 0) AS at FROM ("
            'SELECT min(input_offset) AS at FROM projection_watermarks GROUP BY "partition") AS marks'
        )
        return float(sum(self.producer.sent.values()) - row["at"])

    async def _look(self) -> None:
        now = time.time()
        for name, process in self.processes.items():
            with process.oneshot():
                counts = {
                    "rss": process.memory_info().rss / _MIB,
                    "fds": process.num_fds(),
                    "threads": process.num_threads(),
                    "cpu": sum(process.cpu_times()[:2]),
                }
            for kind, value in counts.items():
                self.seen[name][kind].append(Point(now, value))
        sizes = measure_topics(self.logs)
        for topic, size in sizes.items():
            self.topics[topic].append(Point(now, size / _MIB))
        self.whole["topics"].append(Point(now, len(sizes)))
        [row] = await self.road.fetch("SELECT count(*) AS sessions FROM pg_stat_activity")
        self.whole["PostgreSQL sessions"].append(Point(now, row["sessions"]))
        self.whole["lag in events"].append(Point(now, await self.lag()))

    def read_counts(self) -> None:
        """Take in what the nodes have said about themselves."""
        for role, node in self.nodes.items():
            with node.log.open(errors="replace") as lines:
                for line in lines:
                    if line.startswith(f'{{"event": "{EVENT}"'):
                        counts = json.loads(line)
                        for kind in ("tasks", "blocks"):
                            self.seen[role][kind].append(Point(counts["at"], counts[kind]))


def measure_topics(logs: Path) -> dict[str, int]:
    """Return the bytes of records of each topic; what is deleted just now does not count."""
    sizes: Counter[str] = Counter()
    for folder in os.scandir(logs):
        named = re.fullmatch(r"(.+)-\d+", folder.name)
        if not named or not folder.is_dir():
            continue
        for name in os.listdir(folder.path):
            if name.endswith(".log"):
                try:
                    sizes[named[1]] += os.stat(os.path.join(folder.path, name)).st_size
                except FileNotFoundError:
                    continue
    return dict(sizes)


@dataclass(frozen=True)
class Found:
    """The samples as numbers: all from the warm-up's end to the producer's."""

    watch: Watch
    warm: float
    end: float

    def during(self, points: Sequence[Point]) -> list[Point]:
        """Return the points after the warm-up."""
        return [point for point in points if self.warm <= point.at <= self.end]

    def first(self, points: Sequence[Point]) -> float:
        """Return the value when the warm-up was over."""
        return statistics.median(point.value for point in self.during(points)[:_LAST])

    def last(self, points: Sequence[Point]) -> float:
        """Return the value in the end."""
        return statistics.median(point.value for point in self.during(points)[-_LAST:])

    def most_warm(self, points: Sequence[Point]) -> float:
        """Return the largest value of the warm-up."""
        return max(point.value for point in points if point.at < self.warm)

    def most(self, points: Sequence[Point]) -> float:
        """Return the largest value after the warm-up."""
        return max(point.value for point in self.during(points))

    def slope(self, points: Sequence[Point], *, since: float = 0.0) -> float:
        """Return the growth of an hour by least squares, also from a later part of the time on (0 to 1)."""
        begin = self.warm + since * (self.end - self.warm)
        times, values = zip(*(point for point in self.during(points) if point.at >= begin), strict=True)
        return statistics.linear_regression(times, values).slope * _HOUR

    def describe(self) -> Iterator[str]:
        """Return the report, line by line."""
        yield (
            "| process | RSS MiB warm | at the end | slope MiB/h | of the last half | blocks/h "
            "| fds warm max, end | threads | tasks | CPU % |"
        )
        yield "|---|---|---|---|---|---|---|---|---|---|"
        for name, kinds in self.watch.seen.items():
            rss, cpu = kinds["rss"], self.during(kinds["cpu"])
            blocks = f"{self.slope(kinds['blocks']):,.0f}" if "blocks" in kinds else "-"
            counts = " | ".join(
                f"{self.most_warm(kinds[kind]):g}, {self.last(kinds[kind]):g}" if kind in kinds else "-"
                for kind in _MORE_MAX
            )
            share = (cpu[-1].value - cpu[0].value) / (cpu[-1].at - cpu[0].at) * 100
            yield (
                f"| {name} | {self.first(rss):.1f} | {self.last(rss):.1f} | {self.slope(rss):+.1f} "
                f"| {self.slope(rss, since=0.5):+.1f} | {blocks} | {counts} | {share:.0f} |"
            )
        yield "\n| topic | MiB warm | most | at the end | slope MiB/h |\n|---|---|---|---|---|"
        for name, points in sorted(self.watch.topics.items()):
            yield (
                f"| {name} | {self.first(points):.1f} | {self.most(points):.1f} | {self.last(points):.1f} "
                f"| {self.slope(points):+.1f} |"
            )
        yield "\n| | warm max | most after | at the end | slope /h |\n|---|---|---|---|---|"
        for name, points in self.watch.whole.items():
            yield (
                f"| {name} | {self.most_warm(points):g} | {self.most(points):g} | {self.last(points):g} "
                f"| {self.slope(points):+.1f} |"
            )

    def find_growth(self, plan: Plan) -> Iterator[str]:
        """Return everything that has grown."""
        for name in ROLES:
            kinds = self.watch.seen[name]
            for kind, more in _MORE_MAX.items():
                warm, end = self.most_warm(kinds[kind]), self.last(kinds[kind])
                if end > warm + more:
                    yield f"{name}: {end:g} {kind}, {warm:g} during the warm-up"
            growth, slope = self.last(kinds["rss"]) - self.first(kinds["rss"]), self.slope(kinds["rss"])
            if plan.growth_mib_max is not None and growth > plan.growth_mib_max:
                yield f"{name}: memory has grown by {growth:.1f} MiB after the warm-up"
            if plan.slope_mib_max is not None and slope > plan.slope_mib_max:
                yield f"{name}: memory grows by {slope:.1f} MiB/h"
        topics = self.watch.whole["topics"]
        if self.last(topics) > self.most_warm(topics):
            yield f"{self.last(topics):g} topics, {self.most_warm(topics):g} during the warm-up"
        for name in INTERNAL_TOPICS:
            if (size := self.last(self.watch.topics[name])) > _INTERNAL_MIB_MAX:
                yield f"{name} has {size:.0f} MiB"


async def run_load(watch: Watch, plan: Plan) -> Found:
    """Let the producer send while everything is watched."""
    begun = time.time()
    async with asyncio.TaskGroup() as tasks:
        watching = tasks.create_task(watch.run(plan.sample_seconds))
        await watch.producer.run(watch.road.settings)
        watching.cancel()
    end = time.time()
    watch.read_counts()
    return Found(watch, begun + plan.warm_seconds, end)


async def catch_up(watch: Watch) -> float:
    """Wait until all that was sent is visible; return how long it took, in s."""
    begun = time.monotonic()
    while (lag := await watch.lag()) > 0:
        watch.check()
        assert time.monotonic() - begun < _CATCH_UP_SECONDS_MAX, f"{lag:g} events are still not visible"
        await asyncio.sleep(0.1)
    return time.monotonic() - begun


async def run(folder: Path, plan: Plan) -> None:
    """Start everything, soak, report, and only then judge."""
    with run_services(broker="kafka", database=True, data=None, say=print) as services:
        assert services.postgres_dsn is not None
        await asyncio.to_thread(upgrade, services.postgres_dsn)
        settings = make_settings_for(
            kafka_bootstrap_servers=services.kafka_bootstrap_servers,
            postgres_dsn=services.postgres_dsn,
            kafka_topic_partitions=_PARTITIONS,
            database_command_timeout_seconds=600,  # verify reads the history of hours
        )
        await create_topics(settings)
        broker = psutil.Process(services.pids["broker"])
        with ending(Road(settings, folder)) as road:
            nodes = {role: road.launch("tests.chaos.soaking_node", role) for role in ROLES}
            await road.until(lambda: all(node.has_logged("node_started") for node in nodes.values()))
            processes = {role: psutil.Process(node.process.pid) for role, node in nodes.items()}
            processes |= {PRODUCER: psutil.Process(), BROKER: broker}
            producer = Producer(plan)
            # The broker was started with the path of its properties, which stand beside its logs.
            watch = Watch(road, nodes, producer, processes, Path(broker.cmdline()[-1]).parent / "kafka")
            found = await run_load(watch, plan)
            behind = await catch_up(watch)
            codes = {role: await asyncio.to_thread(node.terminate) for role, node in nodes.items()}
            head = (
                f"{producer.events} events in {plan.seconds:g} s, {plan.events_per_second:g} a second, the first "
                f"{plan.warm_seconds:g} s to warm up; a portion was {producer.late_max:.2f} s late at most; "
                f"all was visible {behind:.1f} s after the last one\n"
            )
            tell([head, *found.describe()])
            verification = await verify(settings)

    assert all_faults(verification) == []
    assert sum(report.outcomes["committed"] for report in verification.partitions) == producer.events
    assert codes == dict.fromkeys(ROLES, 0)
    assert list(found.find_growth(plan)) == []


def tell(lines: Sequence[str]) -> None:
    """Print the report, and write it to the file that SOAK_REPORT names."""
    text = "\n".join(lines)
    print(f"\n{text}", flush=True)
    if path := os.environ.get("SOAK_REPORT"):
        Path(path).write_text(f"{text}\n")


@pytest.mark.integration
@pytest.mark.timeout(600)
async def test_three_minutes(tmp_path: Path) -> None:
    """In a short soak no descriptors, threads, tasks or topics pile up, memory stays, and all events are there."""
    await run(tmp_path, Plan(150, 60, 2, EVENTS_PER_SECOND, growth_mib_max=48))


@pytest.mark.soak
@pytest.mark.timeout(max(2 * _HOUR, MINUTES * 60 * 2))
async def test_long(tmp_path: Path) -> None:
    """In a long soak memory is flat after the warm-up, nothing piles up, and all events are there."""
    seconds = MINUTES * 60
    await run(tmp_path, Plan(seconds, min(600.0, seconds / 4), 10, EVENTS_PER_SECOND, slope_mib_max=20))
