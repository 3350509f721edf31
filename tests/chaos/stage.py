"""Where chaos plays: a broker and a database behind proxies, several nodes of each role, a constant producer.

What the test itself asks and sends goes past the proxies. Nodes that end by themselves are started again, as a
supervisor would, and remembered: a fault must not end a node.
"""

from __future__ import annotations

import asyncio
import os
import random
import signal
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

import asyncpg

from migrations.run import upgrade
from pipeline.client import EventProducer
from pipeline.embedded import Services, run_services
from pipeline.errors import ServiceUnavailable
from pipeline.events import FileEvent
from pipeline.servers.brokers import Kafka, free_port
from pipeline.settings import Settings
from pipeline.topics import create_topics
from tests.fix_proxy import TcpProxy, run_proxy
from tests.fix_road import NodeProcess, Road, ending
from tests.fix_services import make_settings_for

ROLES: Final = ("hasher", "reducer", "projector")
PARTITIONS: Final = 4
SESSION_SECONDS: Final = 3.0
#: Longest that a recovery may take before the run counts as failed, in s.
RECOVERY_SECONDS_MAX: Final = 120.0
_URIS: Final = 2000
#: Events are sent in portions, so many each second.
_PORTIONS_PER_SECOND: Final = 5
_POLL_SECONDS: Final = 0.05


class ProxiedKafka(Kafka):
    """Apache Kafka with a second listener that it tells clients to reach through a proxy."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder, say=_say_nothing)
        self.proxied_port = free_port()
        #: Host and port of the proxy; to be set before `prepare`.
        self.proxy_address = ""

    def _make_properties(self, state: Path) -> dict[str, object]:
        properties = super()._make_properties(state)
        added = {
            "listeners": f"PROXIED://127.0.0.1:{self.proxied_port}",
            "advertised.listeners": f"PROXIED://{self.proxy_address}",
            "listener.security.protocol.map": "PROXIED:PLAINTEXT",
        }
        return properties | {name: f"{properties[name]},{value}" for name, value in added.items()}


@dataclass
class Stage:
    """Everything that a fault can disturb, and what has been sent and seen."""

    kafka: ProxiedKafka
    services: Services
    kafka_proxy: TcpProxy
    postgres_proxy: TcpProxy
    #: Past the proxies.
    settings: Settings
    road: Road
    chance: random.Random
    events_per_second: float
    away_seconds: float
    #: The nodes by role and slot; a slot keeps its settings over restarts.
    nodes: dict[tuple[str, int], NodeProcess] = field(default_factory=dict)
    #: Nodes that a fault has ended and not started again yet.
    missing: set[tuple[str, int]] = field(default_factory=set)
    #: The last words of nodes that ended by themselves, though they had started.
    deaths: list[str] = field(default_factory=list)
    events: list[FileEvent] = field(default_factory=list)
    #: The next offset of each partition after what Kafka has acknowledged, and what is visible.
    sent: Counter[int] = field(default_factory=Counter)
    visible: dict[int, int] = field(default_factory=dict)
    #: How often the producer had to connect again.
    interruptions: int = 0
    _quiet: bool = False
    _producing: asyncio.Task[None] | None = None

    def start(self, role: str, slot: int) -> NodeProcess:
        """Start the node of a slot. Every second reducer keeps its table on disk."""
        variables = {}
        if role == "reducer" and slot % 2:
            variables = {"TABLE_STORE": "rocksdb", "TABLE_DIR": str(self.road.logs / f"tables-{slot}")}
        node = self.road.start(role, **variables)
        self.nodes[role, slot] = node
        self.missing.discard((role, slot))
        return node

    async def kill(self, place: tuple[str, int]) -> None:
        """Kill the node of a slot with SIGKILL and leave the slot empty."""
        self.missing.add(place)
        await asyncio.to_thread(self.nodes[place].kill)

    async def terminate(self, place: tuple[str, int]) -> None:
        """Stop the node of a slot with SIGTERM and leave the slot empty."""
        self.missing.add(place)
        node = self.nodes[place]
        code = await asyncio.to_thread(node.terminate)
        # Before it has started it has nothing to give back, and no handler for the signal.
        if code != 0 and node.has_logged('"node_started"'):
            self.deaths.append(f"{place} ended with {code} when it was told to: {_last_line(node)}")

    def pick(self, *roles: str) -> tuple[str, int]:
        """Draw one of the running nodes of these roles (default: all)."""
        places = sorted(self.nodes.keys() - self.missing)
        return self.chance.choice([place for place in places if place[0] in (roles or ROLES)])

    def is_visible(self, mark: Counter[int]) -> bool:
        """Tell whether everything before this mark can be seen in PostgreSQL."""
        return all(self.visible.get(partition, 0) >= offset for partition, offset in mark.items())

    async def until_working(self) -> float:
        """Wait until an event of every partition that was sent from now on is visible; return how long it took, in s.

        Raises:
            AssertionError: as `until`.
        """
        begun, before = time.monotonic(), self.sent.copy()
        await self.until(lambda: all(self.sent[number] > before[number] for number in range(PARTITIONS)))
        mark = self.sent.copy()
        await self.until(lambda: self.is_visible(mark))
        return time.monotonic() - begun

    async def until(self, condition: Callable[[], bool]) -> None:
        """Wait for a condition.

        Raises:
            AssertionError: it did not come in time; with the end of each node's log.
        """
        deadline = time.monotonic() + RECOVERY_SECONDS_MAX
        while not condition():
            if time.monotonic() > deadline:
                behind = {number: (self.visible.get(number), offset) for number, offset in self.sent.items()}
                tails = "\n".join(f"--- {place}\n{_tail(node)}" for place, node in self.nodes.items())
                raise AssertionError(f"no recovery; (visible, sent) by partition: {behind}\n{tails}")
            await asyncio.sleep(_POLL_SECONDS)

    async def be_quiet(self) -> None:
        """Stop producing, once what is under way has been acknowledged, and wait until all is visible."""
        self._quiet = True
        assert self._producing is not None
        await self._producing
        await self.until(lambda: self.is_visible(self.sent))

    async def produce(self) -> None:
        """Send events at a constant rate, until it is quiet; what Kafka did not acknowledge is sent again."""
        size = round(self.events_per_second / _PORTIONS_PER_SECOND)
        due = time.monotonic()
        portion: list[FileEvent] = []
        while not self._quiet:
            with suppress(ServiceUnavailable):
                async with EventProducer(self.settings) as producer:
                    while not self._quiet:
                        if not portion:
                            portion = [self._make_event(len(self.events) + number) for number in range(size)]
                            self.events += portion
                        for partition, offset in await producer.send_all(portion):
                            self.sent[partition] = max(self.sent[partition], offset + 1)
                        portion = []
                        due = max(due + 1 / _PORTIONS_PER_SECOND, time.monotonic() - 1)
                        await asyncio.sleep(max(0.0, due - time.monotonic()))
            self.interruptions += not self._quiet
            await asyncio.sleep(_POLL_SECONDS)

    def _make_event(self, number: int) -> FileEvent:
        return FileEvent(
            event_id=f"{number:032x}",
            # Drawn by the number, so that the rate of the events has no part in which faults are drawn.
            uri=f"file:///made/{random.Random(number).randrange(_URIS)}.bin",
            op="modified",
            occurred_at=datetime.now(UTC),
            content=number.to_bytes(8, "big"),
        )

    async def look(self) -> None:
        """Keep `visible` up to date, as far as the database can be asked."""
        query = (
            'SELECT "partition", min(input_offset) AS at FROM projection_watermarks '
            'WHERE input_offset IS NOT NULL GROUP BY "partition"'
        )
        while True:
            with suppress(
                OSError, TimeoutError, asyncpg.PostgresError, asyncpg.InterfaceError, asyncpg.InternalClientError
            ):
                connection = await asyncpg.connect(self.settings.postgres_url, timeout=2, command_timeout=2)
                try:
                    while True:
                        self.visible = {row["partition"]: row["at"] for row in await connection.fetch(query)}
                        await asyncio.sleep(_POLL_SECONDS)
                finally:
                    connection.terminate()
            await asyncio.sleep(_POLL_SECONDS)

    async def supervise(self) -> None:
        """Start nodes again that have ended by themselves."""
        while True:
            for place, node in list(self.nodes.items()):
                if place not in self.missing and node.process.poll() is not None:
                    if not _has_missed_a_service(node):
                        code = node.process.returncode
                        self.deaths.append(f"{place} ended by itself with {code}: {_last_line(node)}")
                    self.start(*place)
            await asyncio.sleep(_POLL_SECONDS)

    async def fetch(self, sql: str) -> list[Any]:
        """Ask the database past the proxy."""
        connection = await asyncpg.connect(self.settings.postgres_url)
        try:
            rows: list[Any] = await connection.fetch(sql)
            return rows
        finally:
            await connection.close()

    async def restart_broker(self, *, kill: bool) -> None:
        """Stop the broker, or kill it, and start it again."""
        if kill:
            assert self.kafka.process is not None
            self.kafka.process.kill()
            await self.kafka.process.wait()
        await self.kafka.stop()
        await self.kafka.start()

    async def restart_postgres(self, number: signal.Signals, *, away_seconds: float = 0.0) -> None:
        """End PostgreSQL with a signal (SIGINT: fast, SIGQUIT: immediate) and start it again after a while."""
        os.kill(self.services.pids["database"], number)
        await asyncio.to_thread(self.services.stop, "database")
        await asyncio.sleep(away_seconds)
        await asyncio.to_thread(self.services.start, "database")


@asynccontextmanager
async def run_stage(
    folder: Path, *, seed: int, events_per_second: float, away_seconds: float, variables: dict[str, Any]
) -> AsyncIterator[Stage]:
    """Set the stage: servers, proxies, topics, tables, two nodes of each role; all is gone in the end."""
    async with AsyncExitStack() as stack:
        kafka = ProxiedKafka(folder)
        kafka_proxy = await stack.enter_async_context(run_proxy(("127.0.0.1", kafka.proxied_port)))
        kafka.proxy_address = kafka_proxy.address
        await kafka.prepare()
        stack.push_async_callback(kafka.stop)
        await kafka.start()
        services = stack.enter_context(run_services(broker=None, database=True, data=None, say=_say_nothing))
        dsn = services.postgres_dsn
        assert dsn is not None
        await asyncio.to_thread(upgrade, dsn)
        sockets = dsn.partition("?host=")[2].partition("&")[0]
        postgres_proxy = await stack.enter_async_context(run_proxy(f"{sockets}/.s.PGSQL.5432"))
        settings = make_settings_for(
            kafka_bootstrap_servers=kafka.address,
            postgres_dsn=dsn,
            kafka_topic_partitions=PARTITIONS,
            **{"kafka_session_timeout_ms": round(SESSION_SECONDS * 1000), **variables},
        )
        await create_topics(settings)
        database = dsn.partition("@/")[2].partition("?")[0]
        behind_proxies = settings.model_copy(
            update={
                "kafka_bootstrap_servers": kafka_proxy.address,
                "postgres_dsn": type(settings.postgres_dsn)(  # type: ignore[misc] # it is set
                    f"postgresql://postgres@{postgres_proxy.address}/{database}"
                ),
            }
        )
        road = stack.enter_context(ending(Road(behind_proxies, folder)))
        stage = Stage(
            kafka,
            services,
            kafka_proxy,
            postgres_proxy,
            settings,
            road,
            random.Random(seed),
            events_per_second,
            away_seconds,
        )
        for role in ROLES:
            for slot in (0, 1):
                stage.start(role, slot)
        async with asyncio.TaskGroup() as tasks:
            stage._producing = tasks.create_task(stage.produce())
            background = [tasks.create_task(work) for work in (stage.look(), stage.supervise())]
            try:
                yield stage
            finally:
                for task in (stage._producing, *background):
                    task.cancel()


def _say_nothing(_line: str) -> None:
    """Take a line of a server that starts."""


def _tail(node: NodeProcess) -> str:
    return node.log.read_text(errors="replace")[-3000:]


def _has_missed_a_service(node: NodeProcess) -> bool:
    """Tell whether a node could not start, because a service was away: it ends with a line that says so, on purpose."""
    told = node.process.returncode == 1 and _last_line(node).startswith("stampline: ")
    return told and not node.has_logged('"node_started"')


def _last_line(node: NodeProcess) -> str:
    return (_tail(node).splitlines() or ["said nothing"])[-1]
