"""The connections to PostgreSQL, with a network between that delays, cuts, refuses and swallows."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator, Coroutine, Iterator
from typing import Any

import asyncpg
import pytest
from structlog.testing import capture_logs

from pipeline.breaker import State
from pipeline.errors import ServiceUnavailable
from pipeline.postgres import PostgresConnectionManager
from tests.fix_proxy import TcpProxy, through
from tests.fix_services import MakeSettings

pytestmark = pytest.mark.integration

FAILURES = 3
RECOVERY_SECONDS = 60
HALF_OPEN_CALLS = 2
POOL_MAX = 3
#: Long enough for a busy machine, short enough to wait for; with all that comes after a statement it is far below.
COMMAND_SECONDS = 1
HANGING_SECONDS = 30

#: One line, with where and why.
UNANSWERED = r"\APostgreSQL at 127\.0\.0\.1:\d+/\S+ does not answer \(.+\): start it or set POSTGRES_HOST .*\Z"
LEFT_ALONE = r"\APostgreSQL at 127\.0\.0\.1:\d+/\S+ is left alone after 3 failures in a row; next try in \d+ s .*\Z"


class Clock:
    """The clock of the breaker, which a test moves on, in s."""

    now = 0.0

    def __call__(self) -> float:
        """Tell the time."""
        return self.now


@pytest.fixture
def clock() -> Clock:
    """The clock of the breaker."""
    return Clock()


@pytest.fixture
async def manager(
    make_settings: MakeSettings, database: str, proxy: TcpProxy, clock: Clock
) -> AsyncIterator[PostgresConnectionManager]:
    """Open connections through the proxy, with small bounds."""
    settings = make_settings(
        postgres_dsn=through(database, proxy),
        database_pool_min_size=1,
        database_pool_max_size=POOL_MAX,
        database_command_timeout_seconds=COMMAND_SECONDS,
        db_circuit_breaker_failure_threshold=FAILURES,
        db_circuit_breaker_recovery_timeout=RECOVERY_SECONDS,
        db_circuit_breaker_half_open_max_calls=HALF_OPEN_CALLS,
    )
    async with PostgresConnectionManager(settings, clock=clock) as manager:
        yield manager


@pytest.fixture
async def witness(database: str) -> AsyncIterator[asyncpg.Connection[asyncpg.Record]]:
    """A connection past the proxy, with a table for what is written."""
    connection = await asyncpg.connect(database)
    await connection.execute("CREATE TABLE written (value text)")
    yield connection
    await connection.close()


async def _ask(manager: PostgresConnectionManager) -> None:
    async with manager.connection() as connection:
        assert await connection.fetchval("SELECT 1") == 1


async def _fail(manager: PostgresConnectionManager, message: str = UNANSWERED) -> None:
    with pytest.raises(ServiceUnavailable, match=message):
        await _ask(manager)


def _state(manager: PostgresConnectionManager) -> State:
    """Return the state of the breaker, which time alone may change."""
    return manager.breaker.state


async def _until_running(witness: asyncpg.Connection[Any], statement: str) -> None:
    """Wait until somebody runs the statement."""
    running = """
        SELECT count(*) FROM pg_stat_activity
        WHERE datname = current_database() AND state = 'active' AND query = $1
    """
    while not await witness.fetchval(running, statement):
        pass


class _CountedRows:
    """More rows than fit into all the buffers on the way, and how many of them were taken."""

    taken = 0

    def __iter__(self) -> Iterator[tuple[str]]:
        for _ in range(300_000):
            self.taken += 1
            yield ("x" * 100,)


async def _until_stuck(rows: _CountedRows) -> None:
    """Wait until no more rows are taken, however often everybody else has run."""
    seen, turns = -1, 0
    while not rows.taken or turns < 1000:
        await asyncio.sleep(0)
        seen, turns = rows.taken, turns + 1 if rows.taken == seen else 0


async def _ended(running: Coroutine[Any, Any, None] | asyncio.Task[None]) -> None:
    """Wait for something that ends by itself. A cancellation from here could look like such an end."""
    task = asyncio.ensure_future(running)
    done, _ = await asyncio.wait([task], timeout=HANGING_SECONDS)
    assert done, "it hangs"
    await task


async def _assert_all_usable(manager: PostgresConnectionManager) -> None:
    """Use as many connections at once as there may be; then none is in use."""
    together = asyncio.Barrier(POOL_MAX)

    async def use() -> None:
        async with manager.connection() as connection:
            await together.wait()
            assert await connection.fetchval("SELECT 1") == 1

    with capture_logs():
        async with asyncio.TaskGroup() as tasks:
            for _ in range(POOL_MAX):
                tasks.create_task(use())
    stats = manager.get_pool_stats()
    assert (stats["pool_size"], stats["pool_free"], stats["used_connections"]) == (POOL_MAX, POOL_MAX, 0)


async def test_a_slow_network_is_no_failure(manager: PostgresConnectionManager, proxy: TcpProxy) -> None:
    """What takes its time is waited for."""
    proxy.delay_seconds = 0.02
    for _ in range(2 * FAILURES):
        await _ask(manager)

    assert _state(manager) == "closed"
    await _assert_all_usable(manager)


async def test_an_answer_that_takes_too_long_is_given_up(manager: PostgresConnectionManager, proxy: TcpProxy) -> None:
    """A network slower than a statement may take is told; once it is quick again nothing of it is left."""
    proxy.delay_seconds = 3 * COMMAND_SECONDS
    await _fail(manager, "no answer in time")
    await proxy.heal()

    await _assert_all_usable(manager)


async def test_a_connection_cut_in_a_statement(
    manager: PostgresConnectionManager, proxy: TcpProxy, witness: asyncpg.Connection[asyncpg.Record]
) -> None:
    """A statement whose connection is reset fails as unavailable, and the next call connects anew."""

    async def ask() -> None:
        async with manager.connection() as connection:
            await connection.execute("SELECT pg_sleep(600)", timeout=600)

    asking = asyncio.create_task(ask())
    await _until_running(witness, "SELECT pg_sleep(600)")
    proxy.cut()
    with pytest.raises(ServiceUnavailable, match=UNANSWERED):
        await asking

    await _assert_all_usable(manager)


async def test_a_connection_cut_in_a_transaction(
    manager: PostgresConnectionManager, proxy: TcpProxy, witness: asyncpg.Connection[asyncpg.Record]
) -> None:
    """A transaction whose connection is reset leaves nothing; the next one is whole."""

    async def write(value: str, *, cut: bool) -> None:
        async with manager.connection() as connection, connection.transaction():
            await connection.execute("INSERT INTO written VALUES ($1)", value)
            if cut:
                proxy.cut()
            await connection.execute("INSERT INTO written VALUES ($1)", value)

    with pytest.raises(ServiceUnavailable, match=UNANSWERED):
        await write("lost", cut=True)
    await write("kept", cut=False)

    assert [row["value"] for row in await witness.fetch("SELECT value FROM written")] == ["kept", "kept"]
    await _assert_all_usable(manager)


async def test_a_server_that_refuses_is_left_alone_and_tried_again(
    manager: PostgresConnectionManager, proxy: TcpProxy, clock: Clock
) -> None:
    """The breaker opens after the threshold, refuses without asking, tries after the timeout, and closes."""
    with capture_logs() as lines:
        await proxy.refuse()
        for _ in range(FAILURES):
            await _fail(manager)
        assert _state(manager) == "open"
        await _fail(manager, LEFT_ALONE)

        clock.now += RECOVERY_SECONDS
        await _fail(manager, r"connection refused")
        assert _state(manager) == "open"

        await proxy.heal()
        await _fail(manager, "is left alone after 4 failures")
        clock.now += RECOVERY_SECONDS
        for _ in range(HALF_OPEN_CALLS):
            assert _state(manager) == "half_open"
            await _ask(manager)

    assert _state(manager) == "closed"
    assert [line["event"] for line in lines] == ["breaker_opened", "breaker_opened", "breaker_closed"]
    await _assert_all_usable(manager)


async def test_a_few_try_while_the_others_are_refused(
    manager: PostgresConnectionManager, proxy: TcpProxy, clock: Clock
) -> None:
    """Of many calls at once after the timeout only so many as the setting says go to the server."""
    with capture_logs():
        await proxy.refuse()
        for _ in range(FAILURES):
            await _fail(manager)
        await proxy.heal()
        clock.now += RECOVERY_SECONDS

        results = await asyncio.gather(*(_ask(manager) for _ in range(10)), return_exceptions=True)

    assert [result for result in results if not isinstance(result, ServiceUnavailable)] == [None] * HALF_OPEN_CALLS
    assert all("at most 2 calls at once" in str(result) for result in results if result is not None)
    assert _state(manager) == "closed"


async def test_the_pool_asks_the_breaker_before_it_connects_by_itself(
    manager: PostgresConnectionManager, proxy: TcpProxy, clock: Clock
) -> None:
    """Asyncpg restores idle connections, whoever calls or not; but not while the server is to be left alone."""
    with capture_logs():
        await proxy.refuse()
        for _ in range(FAILURES):
            await _fail(manager)
    await proxy.heal()

    with pytest.raises(ServiceUnavailable, match=LEFT_ALONE):
        await manager._connect("postgresql://never/asked")


async def test_a_black_hole_is_bounded(manager: PostgresConnectionManager, proxy: TcpProxy, clock: Clock) -> None:
    """Neither an open connection nor a new one waits longer than it may; afterwards all is as before."""
    with capture_logs():
        await _assert_all_usable(manager)
        proxy.swallow()
        async with asyncio.TaskGroup() as tasks:
            # All that there are, and those that wait for them.
            for _ in range(POOL_MAX):
                tasks.create_task(_fail(manager, "no answer in time"))
        assert manager.get_pool_stats()["used_connections"] == 0
        assert _state(manager) == "open"

        clock.now += RECOVERY_SECONDS
        # This one has to connect.
        await _fail(manager, "no answer in time")
        assert _state(manager) == "open"

        await proxy.heal()
        clock.now += RECOVERY_SECONDS
        for _ in range(HALF_OPEN_CALLS):
            await _ask(manager)

    assert _state(manager) == "closed"
    await _assert_all_usable(manager)


@pytest.mark.parametrize("rows", [1, 300_000])
async def test_a_black_hole_in_a_copy(
    manager: PostgresConnectionManager, proxy: TcpProxy, witness: asyncpg.Connection[asyncpg.Record], rows: int
) -> None:
    """A COPY ends in time too, also one that is larger than all the buffers on the way; nothing of it is left."""

    async def copy() -> None:
        async with manager.connection() as connection, connection.transaction():
            # Once before, so that it does not wait for the types of the columns.
            await connection.copy_records_to_table("written", records=[("x",)])
            proxy.swallow()
            await connection.copy_records_to_table("written", records=[("x" * 100,)] * rows)

    with capture_logs(), pytest.raises(ServiceUnavailable, match="no answer in time"):
        await _ended(copy())
    assert manager.get_pool_stats()["used_connections"] == 0
    await proxy.heal()

    await _assert_all_usable(manager)
    assert await witness.fetchval("SELECT count(*) FROM written") == 0


async def test_a_copy_cut_while_it_waits_for_room(
    make_settings: MakeSettings, database: str, proxy: TcpProxy, witness: asyncpg.Connection[asyncpg.Record]
) -> None:
    """A COPY that cannot go on ends with its connection, not with its time."""
    settings = make_settings(postgres_dsn=through(database, proxy), database_command_timeout_seconds=600)
    async with PostgresConnectionManager(settings) as manager:
        rows = _CountedRows()

        async def copy() -> None:
            async with manager.connection() as connection, connection.transaction():
                await connection.copy_records_to_table("written", records=[("x",)])
                proxy.swallow()
                await connection.copy_records_to_table("written", records=rows)

        copying = asyncio.create_task(copy())
        await _until_stuck(rows)
        proxy.cut()
        with capture_logs(), pytest.raises(ServiceUnavailable, match=UNANSWERED):
            await _ended(copying)

        assert manager.get_pool_stats()["used_connections"] == 0
    assert await witness.fetchval("SELECT count(*) FROM written") == 0


async def test_a_cancelled_call_in_a_black_hole(
    make_settings: MakeSettings, database: str, proxy: TcpProxy, witness: asyncpg.Connection[asyncpg.Record]
) -> None:
    """Who is cancelled does not wait as long as a statement may take until the dead server takes the ROLLBACK."""
    settings = make_settings(postgres_dsn=through(database, proxy), database_command_timeout_seconds=600)
    async with PostgresConnectionManager(settings) as manager:

        async def wait() -> None:
            async with manager.connection() as connection, connection.transaction():
                await connection.execute("SELECT pg_sleep(600)")

        waiting = asyncio.create_task(wait())
        await _until_running(witness, "SELECT pg_sleep(600)")
        proxy.swallow()
        waiting.cancel()
        with pytest.raises((asyncio.CancelledError, ServiceUnavailable)):
            await _ended(waiting)

        assert manager.get_pool_stats()["used_connections"] == 0


async def test_closing_in_a_black_hole(
    make_settings: MakeSettings, database: str, proxy: TcpProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A dead server does not keep the process from ending."""
    monkeypatch.setattr("pipeline.postgres.CLOSE_TIMEOUT_SECONDS", 0.1)
    settings = make_settings(postgres_dsn=through(database, proxy), database_command_timeout_seconds=600)
    manager = PostgresConnectionManager(settings)
    await manager.open()
    await _ask(manager)
    proxy.swallow()
    await _ended(manager.aclose())

    assert manager.get_pool_stats()["pool_size"] == 0


async def test_closing_after_a_cut(manager: PostgresConnectionManager, proxy: TcpProxy) -> None:
    """Connections that are gone already are no trouble at the end."""
    await _ask(manager)
    proxy.cut()
    await manager.aclose()

    assert manager.get_pool_stats()["pool_size"] == 0


async def test_connecting_to_a_black_hole(
    make_settings: MakeSettings, database: str, proxy: TcpProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A start against a server that takes connections and says nothing ends with one line."""
    monkeypatch.setattr("pipeline.postgres.CONNECT_TIMEOUT_SECONDS", 0.1)
    proxy.swallow()
    with pytest.raises(ServiceUnavailable, match=re.compile(UNANSWERED)):
        await _ended(PostgresConnectionManager(make_settings(postgres_dsn=through(database, proxy))).open())
