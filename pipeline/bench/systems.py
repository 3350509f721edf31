"""What is measured: the chain, as users run it, and the limit, which a person would write by hand for one machine.

Each system of each run has a database and topics of its own, so that nothing is warm for the second one but the
services themselves.
"""

from __future__ import annotations

import asyncio
import json
import uuid
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import ClassVar, Final, Self
from urllib.parse import urlsplit, urlunsplit

import asyncpg

from agents import hasher, reducer
from migrations import run as migrations
from pipeline.bench.load import Load, librdkafka_options, produce
from pipeline.bench.meter import Stage
from pipeline.bench.probe import KafkaProbe
from pipeline.errors import StamplineError
from pipeline.postgres import connecting, tls_context
from pipeline.settings import Settings, load_settings
from pipeline.topics import FILE_EVENTS, FILE_STAMPS, TOPICS, create_topics, topic_name
from projections import file_history

_ROOT: Final = Path(__file__).parents[2]
#: The program of the limit, which only a checkout has.
LIMIT: Final = _ROOT / "tests" / "performance" / "peers" / "limit.py"


@dataclass(frozen=True)
class Site:
    """Where a bench takes place: how to reach the services, and their process ids, None = they run elsewhere."""

    settings: Settings
    pids: Mapping[str, int | None]
    kafka: KafkaProbe = field(init=False)

    def __post_init__(self) -> None:
        partitions = self.settings.kafka_topic_partitions
        object.__setattr__(self, "kafka", KafkaProbe(librdkafka_options(self.settings), partitions=partitions))

    async def execute(self, statement: str) -> None:
        """Run one statement in the database that the settings name.

        Raises:
            ServiceUnavailable, SettingsError: PostgreSQL does not let us in.
        """
        connection = await connect(self.settings)
        try:
            await connection.execute(statement)
        finally:
            await connection.close()


async def connect(settings: Settings) -> asyncpg.Connection[asyncpg.Record]:
    """Connect to the database of these settings.

    Raises:
        ServiceUnavailable, SettingsError: PostgreSQL does not let us in.
    """
    with connecting(settings.postgres_url):
        return await asyncpg.connect(settings.postgres_url, ssl=tls_context(settings))


class System(ABC):
    """One system with its own database and topics, filled with the events of a load; an async context manager.

    Args:
        site: where it runs.
        load: the events that wait for it when the context is entered.
    """

    name: ClassVar[str]

    def __init__(self, site: Site, load: Load) -> None:
        self._site = site
        self._load = load
        self._id = f"bench-{uuid.uuid4().hex[:12]}"
        url = urlsplit(site.settings.postgres_url)._replace(path=f"/{self._id}")
        self._settings = load_settings(
            kafka_bootstrap_servers=site.settings.kafka_bootstrap_servers,
            kafka_topic_prefix=f"{self._id}-",
            postgres_dsn=urlunsplit(url),
        )
        self._events_topic = topic_name(self._settings, FILE_EVENTS)
        self._counts: Mapping[str, int] = {}
        self._database: asyncpg.Connection[asyncpg.Record] | None = None

    @property
    def settings(self) -> Settings:
        """Where its topics and its database are."""
        return self._settings

    async def __aenter__(self) -> Self:
        await self._site.execute(f'CREATE DATABASE "{self._id}"')
        try:
            await self._set_up()
            options = librdkafka_options(self._settings)
            self._counts = await asyncio.to_thread(produce, self._load, self._events_topic, options)
            self._database = await connect(self._settings)
        except BaseException:
            await self.aclose()
            raise
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Drop the database and delete the topics."""
        if self._database is not None:
            await self._database.close()
        await asyncio.to_thread(self._site.kafka.delete_topics, self._topics())
        await self._site.execute(f'DROP DATABASE IF EXISTS "{self._id}" WITH (FORCE)')

    @abstractmethod
    async def _set_up(self) -> None: ...

    @abstractmethod
    def _topics(self) -> Sequence[str]: ...

    @abstractmethod
    def stages(self) -> list[Stage]:
        """Return the processes of the system, in the order of the events' road."""

    async def check(self) -> None:
        """Make sure that everything is there, exactly once.

        Raises:
            StamplineError: it is not; says what is wrong.
        """
        rows = await self._query(self._versions)
        wrong = {row["uri"]: row["version"] for row in rows} != self._counts
        faults = ["the versions of the files are not the numbers of their events"] if wrong else []
        for what, count in await self._records():
            if count != self._load.events:
                faults.append(f"{count} {what} of {self._load.events} events")
        if faults:
            raise StamplineError(f"the {self.name} is not exact: {'; '.join(faults)}")

    #: The statement that gives uri and version of each file.
    _versions: ClassVar[str]

    @abstractmethod
    async def _records(self) -> list[tuple[str, int]]:
        """Count what there must be one of for each event: its name, and how many there are."""

    async def _query(self, statement: str, *arguments: object) -> list[asyncpg.Record]:
        assert self._database is not None, "a system is used inside `async with`"
        return await self._database.fetch(statement, *arguments)


class Chain(System):
    """Our three roles, a process each."""

    name = "chain"
    _versions = "SELECT uri, version FROM stampline.files"

    async def _set_up(self) -> None:
        settings = self._settings
        await asyncio.to_thread(migrations.upgrade, settings.postgres_url, tls=tls_context(settings))
        await create_topics(settings)

    def _topics(self) -> list[str]:
        return [topic_name(self._settings, spec.name) for spec in TOPICS]

    def stages(self) -> list[Stage]:
        """Return hasher, reducer and projector."""
        environment = {
            "KAFKA_BOOTSTRAP_SERVERS": self._settings.kafka_bootstrap_servers,
            "KAFKA_TOPIC_PREFIX": self._settings.kafka_topic_prefix,
            "POSTGRES_DSN": self._settings.postgres_url,
            "LOG_LEVEL": "WARNING",
            "METRICS_PORT": "0",
        }
        progress = {"hasher": self._hashed, "reducer": self._reduced, "projector": self._projected}
        return [
            Stage(role, ("-m", "pipeline", "worker", role), environment, finished)
            for role, finished in progress.items()
        ]

    async def _hashed(self) -> int:
        return self._committed(hasher.APP_ID, FILE_EVENTS)

    async def _reduced(self) -> int:
        return self._committed(reducer.APP_ID, FILE_STAMPS)

    async def _projected(self) -> int:
        [row] = await self._query(
            "SELECT coalesce(sum(input_offset), 0)::bigint FROM stampline.watermarks WHERE projection = $1",
            file_history.NAME,
        )
        return int(row[0])

    def _committed(self, group: str, topic: str) -> int:
        return self._site.kafka.committed(topic_name(self._settings, group), topic_name(self._settings, topic))

    async def _records(self) -> list[tuple[str, int]]:
        [row] = await self._query(
            "SELECT count(*), count(DISTINCT (input_partition, input_offset)), "
            "count(*) FILTER (WHERE outcome = 'committed') FROM stampline.file_history"
        )
        names = ("rows of history", "inputs in the history", "committed events")
        return list(zip(names, row, strict=True))


class Limit(System):
    """The hand-written peer, one process."""

    name = "limit"
    _versions = "SELECT uri, version FROM files"

    @property
    def _changelog(self) -> str:
        return topic_name(self._settings, "changelog")

    async def _set_up(self) -> None:
        configs = next(spec.configs for spec in TOPICS if spec.name == FILE_EVENTS)
        replicas = self._settings.kafka_topic_replication_factor
        self._site.kafka.create_topic(self._events_topic, configs, replication_factor=replicas)

    def _topics(self) -> list[str]:
        return [self._events_topic, self._changelog]

    def stages(self) -> list[Stage]:
        """Return its one process."""
        environment = {
            "BENCH_KAFKA": json.dumps(librdkafka_options(self._settings)),
            "BENCH_DSN": self._settings.postgres_url,
            "BENCH_TOPIC": self._events_topic,
            "BENCH_CHANGELOG": self._changelog,
            "BENCH_GROUP": self._id,
        }
        return [Stage("limit", (str(LIMIT),), environment, self._finished)]

    async def _finished(self) -> int:
        return self._site.kafka.committed(self._id, self._events_topic)

    async def _records(self) -> list[tuple[str, int]]:
        return [("records in the changelog", self._site.kafka.end_offsets(self._changelog))]
