"""The connections to PostgreSQL, against a real server."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import asyncpg
import pytest
from structlog.testing import capture_logs

from pipeline.errors import BatchAborted, ServiceUnavailable, SettingsError, StamplineError
from pipeline.postgres import PostgresConnectionManager
from pipeline.settings import Settings
from tests.fix_services import MakeSettings, with_database

pytestmark = pytest.mark.integration


async def test_a_connection_has_the_guards(settings: Settings) -> None:
    """Every connection tells who it is, and the server ends it when it idles inside a transaction."""
    async with PostgresConnectionManager(settings) as manager, manager.connection() as connection:
        assert await connection.fetchval("SHOW application_name") == "stampline"
        assert await connection.fetchval("SHOW idle_in_transaction_session_timeout") == "30s"


async def test_opening_and_closing_twice_is_safe(settings: Settings) -> None:
    """`open` twice opens once, `aclose` may come before `open` and again, and it can be opened anew."""
    manager = PostgresConnectionManager(settings)
    await manager.aclose()
    for _ in range(2):
        await manager.open()
        await manager.open()
        async with manager.connection() as connection:
            assert await connection.fetchval("SELECT 1") == 1
        await manager.aclose()
        await manager.aclose()


async def test_using_it_unopened_says_how_to_open(settings: Settings) -> None:
    """A manager that nobody opened is a bug of the caller, and the message says what to do."""
    with pytest.raises(RuntimeError, match="async with"):
        async with PostgresConnectionManager(settings).connection():
            pass


@pytest.mark.parametrize(
    ("make_dsn", "kind", "message"),
    [
        (
            lambda dsn: with_database(dsn, "nowhere"),
            SettingsError,
            r"database nowhere does not exist.*createdb nowhere",
        ),
        (lambda _dsn: "postgresql://u:s3cret@127.0.0.1:1/db", ServiceUnavailable, r"127.0.0.1:1/db.*refused"),
        (lambda _dsn: "postgresql://u@/db?host=/nowhere", ServiceUnavailable, r"/nowhere:5432/db.*no socket there"),
        (lambda _dsn: "postgresql://u:s3/cret@h/db", SettingsError, r"check POSTGRES_DSN"),
    ],
)
async def test_a_server_that_cannot_be_used_is_told(
    make_settings: MakeSettings,
    database: str,
    make_dsn: Callable[[str], str],
    kind: type[StamplineError],
    message: str,
) -> None:
    """Opening fails with one line that says what is wrong and what to do, and never with the password."""
    manager = PostgresConnectionManager(make_settings(postgres_dsn=make_dsn(database)))

    with pytest.raises(kind, match=message) as caught:
        await manager.open()
    await manager.aclose()

    assert "s3" not in str(caught.value)


async def test_an_unknown_user_is_told(make_settings: MakeSettings, database: str) -> None:
    """A user that the server does not know, or refuses, is named."""
    dsn = "postgresql://nobody_at_all:s3cret@" + database.rpartition("@")[2].removeprefix("postgresql://")

    with pytest.raises(SettingsError, match="refuses user nobody_at_all"):
        await PostgresConnectionManager(make_settings(postgres_dsn=dsn)).open()


async def test_missing_tables_are_told(settings: Settings) -> None:
    """A database that was never migrated is told from a fault, with the command that helps."""
    async with PostgresConnectionManager(settings) as manager:
        async with manager.connection() as connection:
            await connection.execute("DROP SCHEMA stampline CASCADE")
        with pytest.raises(SettingsError, match="stampline migrate upgrade"):
            async with manager.connection() as connection:
                await connection.fetch("SELECT FROM stampline.files")


async def test_a_connection_that_is_cut_comes_back(settings: Settings) -> None:
    """A call on a connection that the server ended fails as unavailable, and the next call connects again."""
    async with PostgresConnectionManager(settings) as manager:
        with pytest.raises(ServiceUnavailable):
            async with manager.connection() as connection:
                await connection.execute("SELECT pg_terminate_backend(pg_backend_pid())")
        async with manager.connection() as connection:
            assert await connection.fetchval("SELECT 1") == 1


async def test_a_pool_in_full_use_is_told(make_settings: MakeSettings) -> None:
    """Who waits too long for a connection hears that the pool is too small, not that the server is away."""
    settings = make_settings(database_pool_max_size=1, database_command_timeout_seconds=0.05)
    async with PostgresConnectionManager(settings) as manager, manager.connection():
        with pytest.raises(ServiceUnavailable, match="DATABASE_POOL_MAX_SIZE"):
            async with manager.connection():
                pass


async def test_an_error_in_the_data_passes_unchanged(settings: Settings) -> None:
    """Only the caller knows which record a data error is about."""
    async with PostgresConnectionManager(settings) as manager:
        with pytest.raises(asyncpg.InvalidTextRepresentationError):
            async with manager.connection() as connection:
                await connection.fetchval("SELECT 'x{'::text::jsonb")


async def test_tls_is_never_given_up_silently(make_settings: MakeSettings, tmp_path: Path) -> None:
    """With ENABLE_SSL_DATABASE a server on TCP that does not speak TLS, or that nobody vouches for, is refused."""

    async def refuse_tls(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readexactly(8)
        writer.write(b"N")
        await writer.drain()
        writer.close()

    async with await asyncio.start_server(refuse_tls, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        settings = make_settings(postgres_dsn=f"postgresql://u@127.0.0.1:{port}/db", enable_ssl_database=True)
        with pytest.raises(ServiceUnavailable, match="SSL"):
            await PostgresConnectionManager(settings).open()


@pytest.fixture
async def strict(make_settings: MakeSettings) -> AsyncIterator[PostgresConnectionManager]:
    """Connections whose breaker opens with the first failure, and a table with two rows."""
    settings = make_settings(db_circuit_breaker_failure_threshold=1)
    async with PostgresConnectionManager(settings) as manager:
        async with manager.connection() as connection:
            await connection.execute("CREATE TABLE counters (name text PRIMARY KEY, value int)")
            await connection.execute("INSERT INTO counters VALUES ('a', 0), ('b', 0)")
        yield manager


INCREMENT = "UPDATE counters SET value = value + 1 WHERE name = $1"


async def test_a_deadlock_aborts_one_batch(strict: PostgresConnectionManager) -> None:
    """Of two transactions that wait for each other one is given up, to be tried again, and the other one goes on."""
    both = asyncio.Barrier(2)

    async def increment(first: str, second: str) -> None:
        async with strict.connection() as connection, connection.transaction():
            await connection.execute(INCREMENT, first)
            await both.wait()
            await connection.execute(INCREMENT, second)

    with capture_logs():
        results = await asyncio.gather(increment("a", "b"), increment("b", "a"), return_exceptions=True)

    [error] = [result for result in results if result is not None]
    assert type(error) is BatchAborted
    assert str(error) == "PostgreSQL gave the transaction up: deadlock detected"
    assert strict.breaker.state == "closed"
    async with strict.connection() as connection:
        assert await connection.fetchval("SELECT array_agg(value) FROM counters") == [1, 1]


async def test_a_serialization_failure_aborts_the_batch(strict: PostgresConnectionManager) -> None:
    """A transaction that saw rows which another one has changed since is given up, to be tried again."""

    async def increment() -> None:
        async with strict.connection() as connection, connection.transaction(isolation="repeatable_read"):
            await connection.fetch("SELECT FROM counters")
            async with strict.connection() as other:
                await other.execute(INCREMENT, "a")
            await connection.execute(INCREMENT, "a")

    with pytest.raises(BatchAborted, match="could not serialize access"):
        await increment()

    assert strict.breaker.state == "closed"


async def test_a_statement_timeout_aborts_the_batch(strict: PostgresConnectionManager) -> None:
    """A statement that the server cancels because it took too long leaves nothing, and can be tried again."""

    async def increment() -> None:
        async with strict.connection() as connection, connection.transaction():
            await connection.execute(INCREMENT, "a")
            await connection.execute("SET LOCAL statement_timeout = '1ms'")
            await connection.execute("SELECT pg_sleep(600)")

    with pytest.raises(BatchAborted, match="statement timeout"):
        await increment()

    assert strict.breaker.state == "closed"
    async with strict.connection() as connection:
        assert await connection.fetchval("SELECT sum(value) FROM counters") == 0


@pytest.mark.parametrize("value", ["not a number", 2**40])
async def test_an_error_in_the_data_is_no_failure_of_the_server(
    strict: PostgresConnectionManager, value: object
) -> None:
    """Neither what the driver refuses nor what the server refuses opens the breaker."""
    with pytest.raises((asyncpg.DataError, asyncpg.InterfaceError)):
        async with strict.connection() as connection:
            await connection.execute("UPDATE counters SET value = $1", value)
    with pytest.raises(asyncpg.UniqueViolationError):
        async with strict.connection() as connection:
            await connection.execute("INSERT INTO counters VALUES ('a', 0)")

    assert strict.breaker.state == "closed"


async def test_the_pool_tells_how_full_it_is(make_settings: MakeSettings) -> None:
    """Lent connections are in use until they come back; at the threshold there is one warning."""
    settings = make_settings(database_pool_max_size=2, postgres_pool_exhaustion_threshold=1)
    async with PostgresConnectionManager(settings) as manager:
        with capture_logs() as lines:
            async with manager.connection():
                assert manager.get_pool_stats()["utilization_percent"] == 50.0
                async with manager.connection():
                    stats = manager.get_pool_stats()
        assert manager.get_pool_stats() == stats | {
            "pool_free": 2,
            "used_connections": 0,
            "utilization_percent": 0.0,
        }

    assert stats == {
        "pool_size": 2,
        "pool_free": 0,
        "pool_max": 2,
        "used_connections": 2,
        "utilization_percent": 100.0,
        "exhaustion_threshold_percent": 100.0,
        "exhaustion_warning_count": 1,
    }
    assert [line["event"] for line in lines] == ["pool_exhaustion"]


async def test_a_pool_in_full_use_does_not_open_the_breaker(make_settings: MakeSettings) -> None:
    """Whoever waits in vain for a connection of ours learns nothing about the server."""
    settings = make_settings(
        database_pool_max_size=1, database_command_timeout_seconds=0.05, db_circuit_breaker_failure_threshold=1
    )
    with capture_logs():
        async with PostgresConnectionManager(settings) as manager, manager.connection():
            with pytest.raises(ServiceUnavailable):
                async with manager.connection():
                    pass
            assert manager.breaker.state == "closed"


async def test_every_statement_is_measured(strict: PostgresConnectionManager) -> None:
    """Each kind of statement is in the ring with its rows, those that failed too, with their time and without rows."""
    async with strict.connection() as connection:
        before = len(strict.query_metrics.snapshot())
        async with connection.transaction():
            await connection.copy_records_to_table("counters", records=[("c", 1), ("d", 2), ("e", 3)])
            await connection.fetch("SELECT name FROM counters")
            await connection.fetchrow("SELECT value FROM counters LIMIT 1")
            await connection.fetchrow("SELECT value FROM counters LIMIT 0")
            await connection.fetchval("SELECT count(*) FROM counters")
            await connection.execute("UPDATE counters SET value = $1", 5)
        with pytest.raises(asyncpg.UniqueViolationError):
            await connection.execute("INSERT INTO counters VALUES ('a', 0)")
        metrics = strict.query_metrics.snapshot()[before:]

    assert [(metric.statement, metric.rows) for metric in metrics] == [
        ("BEGIN", 0),
        ("COPY counters FROM STDIN", 3),
        ("SELECT name FROM counters", 5),
        ("SELECT value FROM counters LIMIT", 1),
        ("SELECT value FROM counters LIMIT", 0),
        ("SELECT count", 1),
        ("UPDATE counters SET value", 5),
        ("COMMIT", 0),
        ("INSERT INTO counters VALUES", 0),
    ]
    assert all(metric.duration_ms > 0 for metric in metrics)
