"""The connections to PostgreSQL, and the one place that knows asyncpg's errors.

Every connection that stampline uses comes through `PostgresConnectionManager.connection`, so whatever has to see every
use of the database (a breaker, a monitor, metrics) has one place to stand. What goes wrong inside comes out as an error
of ours; an error in the *data* passes unchanged, because only the caller knows which record it was.
"""

from __future__ import annotations

import asyncio
import errno
import socket
import ssl
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from types import TracebackType
from typing import Final, Self, TypeAlias
from urllib.parse import parse_qs, unquote, urlsplit

import asyncpg
from asyncpg.pool import PoolConnectionProxy

from pipeline.errors import BatchAborted, ServiceUnavailable, SettingsError, StamplineError
from pipeline.settings import Settings

#: What `PostgresConnectionManager.connection` lends. (A string, for asyncpg is generic in its stubs only.)
Connection: TypeAlias = "PoolConnectionProxy[asyncpg.Record]"

#: Longest a new connection may take, in s.
CONNECT_TIMEOUT_SECONDS: Final = 10
#: Longest `aclose` waits for connections that are in use, in s.
CLOSE_TIMEOUT_SECONDS: Final = 5

# A process that freezes inside a transaction (paused, swapped out) keeps its row locks; so long and no longer.
_IDLE_IN_TRANSACTION_MS: Final = 30_000

_UNAVAILABLE: Final = (
    OSError,
    TimeoutError,
    asyncpg.InterfaceError,
    asyncpg.PostgresConnectionError,
    # Too many connections, disk full, out of memory.
    asyncpg.InsufficientResourcesError,
    asyncpg.CannotConnectNowError,
    asyncpg.AdminShutdownError,
    asyncpg.CrashShutdownError,
    # The primary has moved away and this is a standby now.
    asyncpg.ReadOnlySQLTransactionError,
)
_ABORTED: Final = (
    asyncpg.DeadlockDetectedError,
    asyncpg.SerializationError,
    asyncpg.LockNotAvailableError,
    asyncpg.QueryCanceledError,
    asyncpg.IdleInTransactionSessionTimeoutError,
    # A migration ran under a prepared statement; the next transaction prepares it anew.
    asyncpg.InvalidCachedStatementError,
)
#: The server or the driver does not take these values; the same statement will never succeed.
_REFUSED: Final = (
    asyncpg.DataError,
    # What the driver finds itself, before anything is sent, is another class of the same name.
    asyncpg.exceptions._base.DataError,  # noqa: SLF001 - it is public under no name
    asyncpg.IntegrityConstraintViolationError,
    asyncpg.ProgramLimitExceededError,
)
_NOT_MIGRATED: Final = (
    asyncpg.UndefinedTableError,
    asyncpg.UndefinedColumnError,
    asyncpg.UndefinedFunctionError,
    asyncpg.InvalidSchemaNameError,
)


class PostgresConnectionManager:
    """A pool of connections to PostgreSQL: open it with `async with`, or with `open` and `aclose`.

    It survives a server that goes away: calls fail with `ServiceUnavailable` meanwhile, and the pool connects again
    with the first call after that.
    """

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._pool: asyncpg.Pool[asyncpg.Record] | None = None

    async def open(self) -> None:
        """Connect. Calling it again does nothing.

        Raises:
            ServiceUnavailable: the server does not answer.
            SettingsError: wrong user, password, database or connection string.
        """
        if self._pool is not None:
            return
        settings = self._settings
        pool = asyncpg.create_pool(
            settings.postgres_url,
            min_size=settings.database_pool_min_size,
            max_size=settings.database_pool_max_size,
            command_timeout=settings.database_command_timeout_seconds,
            timeout=CONNECT_TIMEOUT_SECONDS,
            # None leaves it to the connection string.
            ssl=tls_context(settings),
            server_settings={
                "application_name": "stampline",
                "idle_in_transaction_session_timeout": str(_IDLE_IN_TRANSACTION_MS),
            },
        )
        with connecting(settings.postgres_url):
            await pool
        self._pool = pool

    async def aclose(self) -> None:
        """Close all connections, those in use after `CLOSE_TIMEOUT_SECONDS`. Safe before `open` and twice."""
        pool, self._pool = self._pool, None
        if pool is None:
            return
        try:
            async with asyncio.timeout(CLOSE_TIMEOUT_SECONDS):
                await pool.close()
        except TimeoutError:
            pool.terminate()

    async def __aenter__(self) -> Self:
        await self.open()
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.aclose()

    @asynccontextmanager
    async def connection(self) -> AsyncIterator[Connection]:
        """Lend one connection; wait for one at most as long as a statement may take.

        Put nothing but work on this connection into the block: an OSError from there counts as the database's.

        Raises:
            ServiceUnavailable: the server does not answer, or every connection stayed in use.
            BatchAborted: the server gave the transaction up (deadlock, lock or idle timeout); nothing of it is left.
            SettingsError: the tables are missing, or the user may not use them.
        """
        pool = self._pool
        if pool is None:
            raise RuntimeError("PostgresConnectionManager is not open: use `async with`, or call `open` first")
        timeout_seconds = self._settings.database_command_timeout_seconds
        lent = False
        try:
            async with pool.acquire(timeout=timeout_seconds) as connection:
                lent = True
                yield connection
        except StamplineError:
            raise
        except Exception as exc:
            if isinstance(exc, TimeoutError) and not lent and pool.get_size() == pool.get_max_size():
                raise ServiceUnavailable(
                    f"all {pool.get_max_size()} connections to PostgreSQL were in use for {timeout_seconds:g} s: "
                    "set DATABASE_POOL_MAX_SIZE higher"
                ) from exc
            ours = translate(exc, self._settings.postgres_url)
            if ours is None:
                raise
            raise ours from exc


def tls_context(settings: Settings) -> ssl.SSLContext | None:
    """Return how to verify the server where ENABLE_SSL_DATABASE is on, else None."""
    if not settings.enable_ssl_database:
        return None
    return ssl.create_default_context(cafile=settings.postgres_ssl_ca)


@contextmanager
def connecting(dsn: str) -> Iterator[None]:
    """Translate what goes wrong while a connection to `dsn` is made, a malformed `dsn` included.

    Raises:
        ServiceUnavailable: the server does not answer.
        SettingsError: wrong user, password, database or connection string.
    """
    try:
        yield
    except Exception as exc:
        if isinstance(exc, ValueError) and not isinstance(exc, OSError):
            # Without the cause: its message can hold a part of the password.
            raise SettingsError("the connection string of PostgreSQL is not valid: check POSTGRES_DSN") from None
        ours = translate(exc, dsn)
        if ours is None:
            raise
        raise ours from exc


def refuses_data(exc: BaseException) -> bool:
    """Whether an error is about the values that were written, so that trying again cannot help."""
    return isinstance(exc, _REFUSED)


def translate(exc: BaseException, dsn: str) -> StamplineError | None:
    """Turn an error of asyncpg or of the network into ours, with one line that says what to do.

    `dsn` tells where the server is; its password is never used. Return None for what is not about the connection,
    the transaction or the schema: an error in the data or in our own code.
    """
    if refuses_data(exc):
        return None
    if isinstance(exc, asyncpg.InvalidAuthorizationSpecificationError):
        return SettingsError(
            f"PostgreSQL refuses {_user(dsn)} ({_refusal(exc)}): check POSTGRES_USER and POSTGRES_PASSWORD"
        )
    if isinstance(exc, asyncpg.InvalidCatalogNameError):
        name = _database(dsn)
        return SettingsError(f"database {name} does not exist: create it (createdb {name}) or set POSTGRES_DB")
    if isinstance(exc, _NOT_MIGRATED):
        return SettingsError(f"tables are missing ({_first_line(exc)}): run `stampline migrate upgrade`")
    if isinstance(exc, asyncpg.InsufficientPrivilegeError):
        return SettingsError(f"PostgreSQL does not let {_user(dsn)} do this: {_first_line(exc)}")
    if isinstance(exc, _ABORTED):
        return BatchAborted(f"PostgreSQL gave the transaction up: {_first_line(exc)}")
    if isinstance(exc, ssl.SSLCertVerificationError):
        return SettingsError(
            f"the certificate of PostgreSQL at {_place(dsn)} is not trusted ({_first_line(exc)}): set POSTGRES_SSL_CA"
        )
    if isinstance(exc, _UNAVAILABLE):
        return ServiceUnavailable(
            f"PostgreSQL at {_place(dsn)} does not answer ({_reason(exc)}): "
            "start it or set POSTGRES_HOST and POSTGRES_PORT"
        )
    return None


def _refusal(exc: BaseException) -> str:
    return "password" if isinstance(exc, asyncpg.InvalidPasswordError) else _first_line(exc)


def _first_line(exc: BaseException) -> str:
    """Return the message without the DETAIL and HINT that the driver adds on lines of their own."""
    return str(exc).partition("\n")[0]


def _reason(exc: BaseException) -> str:
    """Say in a few words why the server cannot be reached."""
    message = _first_line(exc)
    if isinstance(exc, ConnectionRefusedError) or f"[Errno {errno.ECONNREFUSED}]" in message:
        return "connection refused"
    if isinstance(exc, FileNotFoundError):
        return "no socket there"
    if isinstance(exc, socket.gaierror):
        return "the host name is not known"
    if isinstance(exc, TimeoutError):
        return "no answer in time"
    return message or type(exc).__name__


def _place(dsn: str) -> str:
    """Return host:port/database of `dsn`, for messages."""
    parts = urlsplit(dsn)
    query = parse_qs(parts.query)
    _, _, address = parts.netloc.rpartition("@")
    host = address or query.get("host", ["localhost"])[0]
    port = "" if ":" in address else ":" + query.get("port", ["5432"])[0]
    return f"{host}{port}/{_database(dsn)}"


def _database(dsn: str) -> str:
    parts = urlsplit(dsn)
    return unquote(parts.path.removeprefix("/")) or parse_qs(parts.query).get("dbname", ["(default)"])[0]


def _user(dsn: str) -> str:
    login, _, _ = urlsplit(dsn).netloc.rpartition("@")
    name = unquote(login.partition(":")[0])
    return f"user {name}" if name else "the default user"
