"""The whole road in a test: topics made, nodes started as processes of their own, events sent, results read.

What came out is compared with the list of events that went in, and by nothing that stampline computes itself.
"""

from __future__ import annotations

import asyncio
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

import asyncpg
import pytest
import pytest_asyncio
from blake3 import blake3

from pipeline.client import EventProducer, Position
from pipeline.events import FileEvent
from pipeline.settings import Settings
from pipeline.topics import create_topics
from tests.fix_services import MakeSettings

#: Longest that anything here may take, in s.
DEADLINE_SECONDS: Final = 90.0
_ROOT: Final = Path(__file__).parents[1]


@dataclass
class NodeProcess:
    """A process that runs roles, as an operator would start it."""

    process: subprocess.Popen[bytes]
    log: Path

    def terminate(self) -> int:
        """Send SIGTERM and return the exit code."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(DEADLINE_SECONDS)

    def kill(self) -> None:
        """Send SIGKILL."""
        self.process.kill()
        self.process.wait(DEADLINE_SECONDS)

    def has_logged(self, text: str) -> bool:
        """Tell whether the log contains a text."""
        return text in self.log.read_text()


@dataclass
class Road:
    """One deployment: its topics and its database are this test's alone."""

    settings: Settings
    logs: Path
    nodes: list[NodeProcess] = field(default_factory=list)

    def start(self, *roles: str, **variables: str) -> NodeProcess:
        """Start a node with these roles."""
        return self.launch("pipeline", "worker", *roles, **variables)

    def launch(self, module: str, *arguments: str, **variables: str) -> NodeProcess:
        """Start a module of ours as a program."""
        log = self.logs / f"node-{len(self.nodes)}-{'-'.join((module, *arguments))}.log"
        with log.open("wb") as output:
            process = subprocess.Popen(
                [sys.executable, "-m", module, *arguments],
                cwd=_ROOT,
                env=environment(self.settings) | {"LOG_FORMAT": "json"} | variables,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
            )
        node = NodeProcess(process, log)
        self.nodes.append(node)
        return node

    async def send(self, events: Sequence[FileEvent]) -> list[Position]:
        """Send events and return where they stand."""
        async with EventProducer(self.settings) as producer:
            return await producer.send_all(events)

    async def send_raw(self, key: bytes | None, value: bytes | None, partition: int) -> None:
        """Send a record that no honest producer would send."""
        from aiokafka import AIOKafkaProducer  # noqa: PLC0415 - one test needs it

        producer = AIOKafkaProducer(
            bootstrap_servers=self.settings.kafka_bootstrap_servers, max_request_size=8 * 2**20, max_batch_size=2**20
        )
        await producer.start()
        try:
            topic = self.settings.kafka_topic_prefix + "file-events"
            await producer.send_and_wait(topic, key=key, value=value, partition=partition)
        finally:
            await producer.stop()

    async def until_visible(self, positions: Sequence[Position], *, may_fail: Sequence[NodeProcess] = ()) -> None:
        """Wait until the watermark of each partition has passed all these positions."""
        wanted: dict[int, int] = {}
        for partition, offset in positions:
            wanted[partition] = max(wanted.get(partition, 0), offset + 1)

        async def reached() -> bool:
            rows = await self.fetch(
                'SELECT "partition", min(input_offset) AS at FROM projection_watermarks '
                'WHERE input_offset IS NOT NULL GROUP BY "partition"'
            )
            marks = {row["partition"]: row["at"] for row in rows}
            return all(marks.get(partition, 0) >= offset for partition, offset in wanted.items())

        await self.until(reached, may_fail=may_fail)

    async def until(self, condition: Callable[[], Any], *, may_fail: Sequence[NodeProcess] = ()) -> None:
        """Wait for a condition, and fail with the nodes' logs if it does not come or one of the other nodes dies."""
        deadline = time.monotonic() + DEADLINE_SECONDS
        while True:
            result = condition()
            if await result if asyncio.iscoroutine(result) else result:
                return
            dead = [
                node
                for node in self.nodes
                if node not in may_fail and node.process.poll() not in {None, 0, -signal.SIGKILL}
            ]
            if dead or time.monotonic() > deadline:
                tails = "\n".join(f"--- {node.log.name}\n{node.log.read_text()[-3000:]}" for node in dead or self.nodes)
                pytest.fail(f"{'a node has died' if dead else 'the condition did not come'}\n{tails}")
            await asyncio.sleep(0.05)

    async def fetch(self, sql: str, *arguments: Any) -> list[Any]:
        """Ask the database as an analyst would."""
        connection = await asyncpg.connect(self.settings.postgres_url)
        try:
            rows: list[Any] = await connection.fetch(sql, *arguments)
            return rows
        finally:
            await connection.close()

    async def assert_exact(self, events: Sequence[FileEvent], positions: Sequence[Position]) -> None:
        """Compare `files` and `file_history` with the list of events: all applied once, in order, and nothing else."""
        versions = Counter(event.uri for event in events)
        digests = {event.uri: blake3(event.content or b"").hexdigest() for event in events}
        files = {row["uri"]: row for row in await self.fetch("SELECT uri, version, digest FROM files")}
        history = Counter(
            (row["input_partition"], row["input_offset"])
            for row in await self.fetch("SELECT input_partition, input_offset FROM file_history")
        )

        assert {uri: row["version"] for uri, row in files.items()} == dict(versions)
        assert {uri: row["digest"] for uri, row in files.items()} == digests
        assert history == Counter(tuple(position) for position in positions)


def environment(settings: Settings) -> dict[str, str]:
    """Return the environment for a process of ours: these settings, and nothing of the developer's."""
    variables = {name: os.environ[name] for name in ("PATH", "HOME", "LANG", "TMPDIR") if name in os.environ}
    for name, field_info in Settings.model_fields.items():
        value = getattr(settings, name)
        if value is None or value == field_info.default:
            continue
        if name == "allowed_roots":
            value = os.pathsep.join(str(root) for root in value)
        secret = getattr(value, "get_secret_value", None)
        variables[name.upper()] = str(secret() if secret else value)
    return variables


def make_events(count: int, uris: int, *, seed: int) -> list[FileEvent]:
    """Make events with inline content, no two of one file alike, so that each one is a new version."""
    chance = random.Random(seed)
    now = datetime.now(UTC)
    return [
        FileEvent(
            event_id=f"{seed:08x}{number:024x}",
            uri=f"file:///made/{chance.randrange(uris)}.bin",
            op="modified",
            occurred_at=now,
            content=number.to_bytes(8, "big") + chance.randbytes(24),
        )
        for number in range(count)
    ]


@contextmanager
def ending(road: Road) -> Iterator[Road]:
    """Kill every node of a road in the end, frozen ones too."""
    try:
        yield road
    finally:
        for node in road.nodes:
            with suppress(ProcessLookupError):
                node.process.kill()
            node.process.wait(DEADLINE_SECONDS)


@pytest_asyncio.fixture
async def road(make_settings: MakeSettings, tmp_path: Path) -> AsyncIterator[Road]:
    """A deployment of four partitions with its topics made and no node started; it may read files of this test."""
    settings = make_settings(kafka_topic_partitions=4, allowed_roots=(tmp_path,))
    await create_topics(settings)
    with ending(Road(settings, tmp_path)) as running:
        yield running
