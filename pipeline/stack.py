"""A whole stampline in one process: services that are not there are started, topics and tables made, all roles run.

What the environment names is used as it is: KAFKA_BOOTSTRAP_SERVERS for the broker, POSTGRES_* for the database.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from migrations import run as migrations
from pipeline import logs
from pipeline.embedded import Broker, Services, run_services
from pipeline.postgres import tls_context
from pipeline.settings import Settings, load_settings
from pipeline.topics import create_topics
from pipeline.worker import ROLES, Node, check_services, run_node

_DATABASE_FIELDS: Final = frozenset({"postgres_dsn", "postgres_host", "postgres_port", "postgres_db", "postgres_user"})
_WATCH_SECONDS: Final = 1.0


@dataclass(frozen=True, slots=True)
class Stack:
    """What runs: the settings to reach it, the roles of this process, and whether the database was started here."""

    settings: Settings
    node: Node
    own_database: bool
    _services: Services | None

    async def watch(self) -> None:
        """Return never.

        Raises:
            StamplineError: a role or a service that was started here has died.
        """
        await asyncio.gather(self.node.watch(), self._watch_services())

    async def _watch_services(self) -> None:
        while True:
            if self._services is not None:
                await asyncio.to_thread(self._services.check)
            await asyncio.sleep(_WATCH_SECONDS)


@asynccontextmanager
async def run_stack(
    *, broker: Broker, data: Path | None, path: Path | None, quiet: bool, say: Callable[[str], None]
) -> AsyncIterator[Stack]:
    """Run everything until the context ends.

    Args:
        broker: which one to start where KAFKA_BOOTSTRAP_SERVERS is not set.
        data: folder that keeps broker and database; None = temporary ones.
        path: a folder whose files the hasher may read, beside ALLOWED_ROOTS.
        quiet: log warnings only, unless LOG_LEVEL is set.
        say: gets one line for each step.

    Raises:
        StamplineError: a service does not start, or the settings do not fit.
    """
    asked = load_settings()
    given = asked.model_fields_set
    own_broker = broker if "kafka_bootstrap_servers" not in given else None
    own_database = not given & _DATABASE_FIELDS
    overrides: dict[str, object] = {}
    if path is not None:
        overrides["allowed_roots"] = (*asked.allowed_roots, path)
    if quiet and "log_level" not in given:
        overrides["log_level"] = "WARNING"
    with run_services(broker=own_broker, database=own_database, data=data, say=say) as services:
        if own_broker is not None:
            overrides["kafka_bootstrap_servers"] = services.kafka_bootstrap_servers
        if own_database:
            overrides["postgres_dsn"] = services.postgres_dsn
        settings = load_settings(**overrides)
        await create_topics(settings)
        await asyncio.to_thread(migrations.upgrade, settings.postgres_url, tls=tls_context(settings))
        transactions = await check_services(settings, ROLES)
        logs.configure(settings)
        say("starting hasher, reducer, retry and projector")
        async with run_node(settings, ROLES, transactions=transactions) as node:
            await node.wait_until_ready()
            own_services = services if own_broker or own_database else None
            yield Stack(settings, node, own_database, own_services)
            say("stopping")
