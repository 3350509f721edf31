"""The composition root: puts the roles of one process together, starts them, watches them and stops them.

Start reading here: a node is a few Faust apps (one for each role, `agents/`) on the batch transport
(`pipeline/transport.py`). The hasher turns file events into stamps, the reducer folds stamps into table `files`
(`tables/`), the retry role sends in again what came too early, the projector writes the table's changelog to
PostgreSQL (`projections/`).
"""

from __future__ import annotations

import asyncio
import gc
import os
import signal
import threading
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial
from typing import Any, Final, cast

from faust.web.drivers.aiohttp import Web

from agents import hasher, projector, reducer, retry
from migrations import run as migrations
from pipeline import logs
from pipeline.app import RoleApp, WebPlace, bind_web_socket, node_name
from pipeline.breaker import DatabaseCircuitBreaker
from pipeline.errors import StamplineError
from pipeline.hashing import FileHasher
from pipeline.health import NodeState, RoleState, add_metrics_page, add_pages
from pipeline.lanes import Label
from pipeline.logs import get_logger
from pipeline.metrics import Metrics, make_registry
from pipeline.postgres import PostgresConnectionManager, tls_context
from pipeline.settings import Settings
from pipeline.topics import has_transactions, require_topics
from tables.kinds import stores

ROLES: Final = ("hasher", "reducer", "retry", "projector")

#: Longest a process takes to end once it is told to, in s.
STOP_SECONDS: Final = 10.0

#: How often a node looks whether all its parts are alive, in s.
_WATCH_SECONDS: Final = 0.5

log = get_logger("stampline.worker")


class Node:
    """The running roles of this process."""

    def __init__(self, apps: dict[str, RoleApp], web: str, breaker: DatabaseCircuitBreaker | None) -> None:
        #: The roles' apps.
        self.apps = apps
        self._breaker = breaker
        self._began = time.monotonic()
        self._started = False
        #: Where its pages are, on loopback.
        self.web = web

    @property
    def ready(self) -> bool:
        """Whether every role has joined its group and all its partitions are live."""
        return all(app.is_ready for app in self.apps.values())

    def look(self) -> NodeState:
        """Return how the node is now, for its health pages."""
        self._note_ready()
        roles = {
            role: RoleState(
                partitions=app.batch_consumer.lanes.status(),
                copies=app.batch_consumer.lanes.copies(),
                ready=app.is_ready,
                reaches_kafka=app.reaches_kafka,
                faults=app.batch_consumer.lanes.faults,
                uses_database=role == "projector",
            )
            for role, app in self.apps.items()
        }
        breaker = self._breaker.state if self._breaker is not None else None
        return NodeState(node_name(), roles, breaker, self._started, time.monotonic() - self._began)

    def _note_ready(self) -> None:
        if not self._started and self.ready:
            self._started = True
            log.info("node_ready", roles=list(self.apps), seconds=round(time.monotonic() - self._began, 3))

    def status(self) -> dict[str, dict[Label, str]]:
        """Return what each partition of each role is doing."""
        return {role: app.batch_consumer.lanes.status() for role, app in self.apps.items()}

    @property
    def web_urls(self) -> list[str]:
        """Where Faust's web view shows the tables of this process."""
        return [f"{self.web}/table/"] if "reducer" in self.apps else []

    async def wait_until_ready(self) -> None:
        """Return once the node is ready.

        Raises:
            StamplineError: a part of it has died.
        """
        while not self.ready:
            self._check()
            await asyncio.sleep(_WATCH_SECONDS / 10)

    async def watch(self) -> None:
        """Return never.

        Raises:
            StamplineError: a part of the node has died; the process should end and be started again.
        """
        while True:
            self._check()
            await asyncio.sleep(_WATCH_SECONDS)

    def _check(self) -> None:
        self._note_ready()
        for role, app in self.apps.items():
            fault = app.find_fault()
            if fault is not None:
                raise StamplineError(f"role {role} has stopped working: {fault}") from fault


async def check_services(settings: Settings, roles: Sequence[str]) -> bool:
    """Make sure that the roles can work; return whether the broker has transactions.

    Raises:
        ServiceUnavailable: Kafka or PostgreSQL does not answer.
        TopicError: a topic is missing or has another shape.
        SettingsError: the settings do not fit the services, or the schema is not the one of this version.
    """
    transactions = await has_transactions(settings)
    await require_topics(settings)
    if "projector" in roles:
        await asyncio.to_thread(migrations.require_head, settings.postgres_url, tls=tls_context(settings))
    return transactions


@asynccontextmanager
async def run_node(settings: Settings, roles: Sequence[str], *, transactions: bool) -> AsyncIterator[Node]:
    """Start the roles; stop them in the end, draining what is in flight.

    Raises:
        ServiceUnavailable: Kafka or PostgreSQL does not answer.
    """
    _tune_garbage_collection()
    if not transactions:
        log.warning("fencing_is_off", reason="the embedded broker has no transactions; do not run two nodes of a role")
    async with AsyncExitStack() as stack:
        create: dict[str, Callable[..., RoleApp]] = {}
        breaker: DatabaseCircuitBreaker | None = None
        metrics = Metrics()
        for role in roles:
            if role == "hasher":
                create[role] = partial(hasher.create_app, settings, stack.enter_context(FileHasher(settings)))
            elif role == "reducer":
                open_store = stack.enter_context(stores(settings))
                create[role] = partial(reducer.create_app, settings, open_store, metrics=metrics)
            elif role == "retry":
                create[role] = partial(retry.create_app, settings, metrics=metrics)
            else:
                manager = await stack.enter_async_context(PostgresConnectionManager(settings))
                breaker = manager.breaker
                create[role] = partial(projector.create_app, settings, manager)
        node = _create_node(create, breaker, metrics, transactions=transactions)
        for app in node.apps.values():
            stack.callback(app.release)
            stack.push_async_callback(app.stop)
        # Watched: Kafka may never let one of them into its group.
        await _first_of(_start(node.apps.values()), node.watch())
        log.info("node_started", roles=list(roles), transactions=transactions, web=node.web)
        yield node
    log.info("node_stopped", roles=list(roles))


async def _start(apps: Iterable[RoleApp]) -> None:
    """Start roles together: each waits for its group to come together."""
    await asyncio.gather(*(app.start() for app in apps))


def _create_node(
    create: dict[str, Callable[..., RoleApp]],
    breaker: DatabaseCircuitBreaker | None,
    metrics: Metrics,
    *,
    transactions: bool,
) -> Node:
    """Make the apps, with one web view for all of them: that of the reducer, which has a table to show, if it is here.

    Each app has the address of the one that serves: it is how the process is known in the groups.
    """
    web_socket = bind_web_socket()
    server = "reducer" if "reducer" in create else next(iter(create))
    apps = {
        role: make(transactions=transactions, web=WebPlace(web_socket, serves=role == server))
        for role, make in create.items()
    }
    node = Node(apps, f"http://127.0.0.1:{web_socket.getsockname()[1]}", breaker)
    router = cast("Web", apps[server].web).web_app.router
    add_pages(router, node.look)
    add_metrics_page(router, make_registry(metrics))
    return node


def _tune_garbage_collection() -> None:
    """Let the collector look less often.

    A batch makes tens of thousands of objects that live for as long as it and have no cycles; with the defaults a
    quarter of each role's CPU went into looking for some (65 µs of CPU an event in all, 46 so; `stampline bench`).
    """
    gc.set_threshold(200_000, 20, 1000)


async def run_until_signalled(settings: Settings, roles: Sequence[str]) -> None:
    """Run a node until SIGTERM or SIGINT, then drain it.

    Raises:
        StamplineError: as `check_services`, `run_node` and `Node.watch`.
    """
    stop = stop_signal()
    transactions = await check_services(settings, roles)
    logs.configure(settings)  # Not before: what is wrong with the services is one line, not a library's log.
    async with run_node(settings, roles, transactions=transactions) as node:
        await until(stop, node.watch())


def stop_signal() -> asyncio.Event:
    """Return an event that SIGTERM and SIGINT set, instead of ending the process.

    From then on the process ends within `STOP_SECONDS`, and at once if it is told again. What is in flight is finished
    or given up in a fraction of that; but aiokafka tries for minutes to say goodbye to a broker that is away, and
    cannot be cancelled in it.
    """
    stop = asyncio.Event()

    def begin() -> None:
        if stop.is_set():
            os._exit(130)  # Asked twice: somebody does not want to wait.
        stop.set()
        last_resort = threading.Timer(STOP_SECONDS, _leave)
        last_resort.daemon = True
        last_resort.start()

    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, begin)
    return stop


def _leave() -> None:
    log.warning("stopped_without_goodbye", timeout_seconds=STOP_SECONDS)
    os._exit(0)


async def until(stop: asyncio.Event, *watched: Coroutine[Any, Any, Any]) -> bool:
    """Wait for the event or for the first of the watched coroutines; return whether it was the event.

    What a watched coroutine raises is raised here; the others are cancelled.
    """
    return await _first_of(stop.wait(), *watched) == 0


async def _first_of(*coroutines: Coroutine[Any, Any, Any]) -> int:
    """Wait for the first coroutine to end, and cancel the others; return its place, or raise what it raised."""
    tasks: list[asyncio.Task[Any]] = [asyncio.create_task(item) for item in coroutines]
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            task.result()
        return next(place for place, task in enumerate(tasks) if task in done)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)
