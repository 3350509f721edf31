"""Run the migrations: what `stampline migrate` and the tests call.

Each migration is one transaction. An advisory lock lets one process migrate a database at a time (the others wait for
it), and no statement waits longer than `LOCK_TIMEOUT_SECONDS` for a table that somebody uses: the migration fails then,
rather than to hold up everybody behind it, and can be tried again.

The functions are synchronous and start an event loop of their own: in a coroutine use `asyncio.to_thread`.
A DSN is what asyncpg takes: `postgresql://user:password@host:5432/db` or `postgresql://user@/db?host=/socket/folder`.
"""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Callable
from pathlib import Path
from typing import Final, TypeVar

import asyncpg
from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from alembic.util import CommandError
from sqlalchemy import Connection, text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import create_async_engine
from sqlalchemy.pool import NullPool

from migrations.schema import SCHEMA
from pipeline.errors import ServiceUnavailable, SettingsError
from pipeline.postgres import CONNECT_TIMEOUT_SECONDS, connecting, translate

#: Longest a statement of a migration waits for a lock on a table.
LOCK_TIMEOUT_SECONDS: Final = 4
#: Longest a migration waits for another process that is migrating the same database.
TURN_TIMEOUT_SECONDS: Final = 120

# Any number that nobody else takes as an advisory lock; this one spells "stamp".
_ADVISORY_LOCK: Final = 0x7374616D70

T = TypeVar("T")


def upgrade(dsn: str, revision: str = "head", *, tls: ssl.SSLContext | None = None) -> None:
    """Migrate the database up to `revision`; nothing happens where it is there already.

    Raises:
        ServiceUnavailable: PostgreSQL does not answer, or somebody kept a lock for too long.
        SettingsError: wrong user, password, database, missing privilege, or a revision that is not known.
    """
    _run(dsn, tls, lambda connection: _migrate(connection, lambda config: command.upgrade(config, revision)))


def downgrade(dsn: str, revision: str, *, tls: ssl.SSLContext | None = None) -> None:
    """Migrate the database down to `revision` (`base` = nothing left). The rows of dropped tables are lost.

    Raises:
        ServiceUnavailable, SettingsError: as `upgrade`.
    """
    _run(dsn, tls, lambda connection: _migrate(connection, lambda config: command.downgrade(config, revision)))


def current(dsn: str, *, tls: ssl.SSLContext | None = None) -> str | None:
    """Return the revision that the database is at, or None where no migration has run. Changes nothing.

    Raises:
        ServiceUnavailable, SettingsError: as `upgrade`.
    """
    return _run(
        dsn,
        tls,
        lambda connection: MigrationContext.configure(
            connection, opts={"version_table_schema": SCHEMA}
        ).get_current_revision(),
    )


def require_head(dsn: str, *, tls: ssl.SSLContext | None = None) -> None:
    """Make sure that the schema is the one that this installation was written for.

    Raises:
        SettingsError: it is not; names the command that helps.
        ServiceUnavailable: as `upgrade`.
    """
    found = current(dsn, tls=tls)
    if found != head():
        raise SettingsError(
            f"the schema of PostgreSQL is at {found or 'nothing yet'}, this version needs {head()}: "
            "run `stampline migrate upgrade`"
        )


def revision(message: str, dsn: str, *, tls: ssl.SSLContext | None = None) -> Path:
    """Write a new migration from the difference between `migrations/schema.py` and the database; return its file.

    Raises:
        ServiceUnavailable, SettingsError: as `upgrade`; also where the database is not at `head`.
    """

    def generate(config: Config) -> Path:
        number = len(list(_scripts(config).walk_revisions())) + 1
        script = command.revision(config, message=message, autogenerate=True, rev_id=f"{number:04d}")
        assert script is not None
        assert not isinstance(script, list)
        return Path(script.path)

    return _run(dsn, tls, lambda connection: _migrate(connection, generate))


def head() -> str:
    """Return the newest revision that this installation knows."""
    newest = _scripts(_config()).get_current_head()
    assert newest is not None
    return newest


def _config() -> Config:
    config = Config()
    # Config interpolates like ConfigParser, so a percent sign in the path has to be doubled.
    config.set_main_option("script_location", str(Path(__file__).parent).replace("%", "%%"))
    config.set_main_option("file_template", "%%(rev)s_%%(slug)s")
    config.set_main_option("path_separator", "os")
    return config


def _scripts(config: Config) -> ScriptDirectory:
    return ScriptDirectory.from_config(config)


def _migrate(connection: Connection, act: Callable[[Config], T]) -> T:
    """Run one command of alembic on `connection` once it is this process's turn."""
    connection.execute(text(f"SET lock_timeout = '{TURN_TIMEOUT_SECONDS}s'"))
    connection.execute(text(f"SELECT pg_advisory_lock({_ADVISORY_LOCK})"))
    connection.execute(text(f"SET lock_timeout = '{LOCK_TIMEOUT_SECONDS}s'"))
    # Alembic keeps its version table in our schema, and makes that table before the first migration runs.
    connection.execute(text(f"CREATE SCHEMA IF NOT EXISTS {SCHEMA}"))
    connection.commit()
    config = _config()
    config.attributes["connection"] = connection
    return act(config)


def _run(dsn: str, tls: ssl.SSLContext | None, act: Callable[[Connection], T]) -> T:
    """Call `act` with a connection of its own and translate what goes wrong."""
    try:
        return asyncio.run(_connect_and_run(dsn, tls, act))
    except CommandError as exc:
        raise SettingsError(f"the migration cannot run: {exc}") from exc
    except DBAPIError as exc:
        cause = getattr(exc.orig, "__cause__", None) or exc
        if isinstance(cause, asyncpg.LockNotAvailableError):
            raise ServiceUnavailable(
                "the migration waited too long for a lock: somebody uses the table or migrates too; try again"
            ) from exc
        ours = translate(cause, dsn)
        raise (ours or exc) from cause


async def _connect_and_run(dsn: str, tls: ssl.SSLContext | None, act: Callable[[Connection], T]) -> T:
    async def create() -> asyncpg.Connection[asyncpg.Record]:
        # asyncpg reads the DSN itself, so that a socket and TLS work as they do for the pool.
        with connecting(dsn):
            return await asyncpg.connect(
                dsn, ssl=tls, timeout=CONNECT_TIMEOUT_SECONDS, server_settings={"application_name": "stampline-migrate"}
            )

    engine = create_async_engine("postgresql+asyncpg://", async_creator=create, poolclass=NullPool)
    try:
        async with engine.connect() as connection:
            return await connection.run_sync(act)
    finally:
        await engine.dispose()
