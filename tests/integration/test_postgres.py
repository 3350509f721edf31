"""The connections to PostgreSQL, against a real server."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path

import asyncpg
import pytest

from pipeline.errors import ServiceUnavailable, SettingsError, StamplineError
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
