"""The connections to PostgreSQL, and the one place that knows asyncpg's errors.

Every connection that stampline uses comes through `PostgresConnectionManager.connection`, so whatever has to see every
use of the database has one place to stand: the breaker, the monitor of the pool, the metrics of the statements. What
goes wrong inside comes out as an error of ours; an error in the *data* passes unchanged, because only the caller knows
which record it was.
"""

from __future__ import annotations

import asyncio
import errno
import socket
import ssl
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from types import TracebackType
from typing import Any, Final, NamedTuple, Self, TypeAlias
from urllib.parse import parse_qs, unquote, urlsplit

import asyncpg
from asyncpg.pool import PoolConnectionProxy

from pipeline.breaker import DatabaseCircuitBreaker
from pipeline.connections import END_TIMEOUT_SECONDS, GuardedConnection
from pipeline.errors import BatchAborted, ServiceUnavailable, SettingsError, StamplineError
from pipeline.pool import PoolMonitor, PoolStats
from pipeline.querymetrics import QueryMetrics
from pipeline.settings import Settings

#: What `PostgresConnectionManager.connection` lends. (A string, for asyncpg is generic in its stubs only.)
Connection: TypeAlias = "PoolConnectionProxy[asyncpg.Record]"

#: Longest a new connection may take, in s.
CONNECT_TIMEOUT_SECONDS: Final = 10
#: Longest `aclose` waits for connections that are in use, in s.
CLOSE_TIMEOUT_SECONDS: Final = 5

# A process that freezes inside a transaction (paused, swapped out) keeps its row locks; so long and no longer.
_IDLE_IN_TRANSACTION_MS: Final = 30_000

#: No connection, or none any more: what the breaker counts.
_UNCONNECTED: Final = (
    OSError,
    TimeoutError,
    asyncpg.InterfaceError,
    # The driver's own state is in disorder, which happens when a connection is lost at the wrong moment (seen once in
    # a hundred faults of `make chaos`).
    asyncpg.InternalClientError,
    asyncpg.PostgresConnectionError,
    asyncpg.TooManyConnectionsError,
    asyncpg.CannotConnectNowError,
    asyncpg.AdminShutdownError,
    asyncpg.CrashShutdownError,
)
_UNAVAILABLE: Final = (
    *_UNCONNECTED,
    # Disk full, out of memory: it answers, so that leaving it alone would help nobody.
    asyncpg.InsufficientResourcesError,
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
#: OpenSSL's numbers for a certificate of another host or address, and for one before or after its time.
_OTHER_NAME: Final = {62, 64}
_OTHER_TIME: Final = {9, 10}
_NOT_MIGRATED: Final = (
    asyncpg.UndefinedTableError,
    asyncpg.UndefinedColumnError,
    asyncpg.UndefinedFunctionError,
    asyncpg.InvalidSchemaNameError,
)


class PostgresConnectionManager:
    """A pool of connections to PostgreSQL: open it with `async with`, or with `open` and `aclose`.

    It survives a server that goes away: calls fail with `ServiceUnavailable` meanwhile, after a few at once and without
    asking the server (`pipeline.breaker`), and the pool connects again with the first call after that.

    Args:
        settings: POSTGRES_*, DATABASE_* and DB_*.
        clock: tells the time, in s; must not go back.
    """

    def __init__(self, settings: Settings, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._settings = settings
        self._pool: asyncpg.Pool[asyncpg.Record] | None = None
        self._place = ""
        self._monitor = PoolMonitor(settings, clock=clock)
        #: Whether the database is left alone.
        self.breaker = DatabaseCircuitBreaker.from_config(settings, clock=clock)
        #: What the latest statements took.
        self.query_metrics = QueryMetrics(settings, clock=clock)

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
            # Never: asyncpg closes statements that are too old without any timeout.
            max_cached_statement_lifetime=0,
            connect=self._connect,
            connection_class=GuardedConnection,
            # None leaves it to the connection string.
            ssl=tls_context(settings),
            server_settings={
                "application_name": "stampline",
                "idle_in_transaction_session_timeout": str(_IDLE_IN_TRANSACTION_MS),
            },
        )
        with connecting(settings.postgres_url):
            await pool
            self._place = _place(settings.postgres_url)
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

    def get_pool_stats(self) -> PoolStats:
        """Return how full the pool is; one that is not open has no connections."""
        pool = self._pool
        if pool is None:
            return self._monitor.stats(size=0, free=0, maximum=self._settings.database_pool_max_size)
        return self._monitor.stats(size=pool.get_size(), free=pool.get_idle_size(), maximum=pool.get_max_size())

    @asynccontextmanager
    async def connection(self) -> AsyncIterator[Connection]:
        """Lend one connection; wait for one at most as long as a statement may take.

        Put nothing but work on this connection into the block: an OSError from there counts as the database's.

        Raises:
            ServiceUnavailable: the server does not answer, it is left alone for a while because it did not, or every
                connection stayed in use.
            BatchAborted: the server gave the transaction up (deadlock, lock or idle timeout); nothing of it is left.
            SettingsError: the tables are missing, or the user may not use them.
        """
        pool = self._pool
        if pool is None:
            raise RuntimeError("PostgresConnectionManager is not open: use `async with`, or call `open` first")
        try:
            with self.breaker.guard(self._place, loses_connection):
                connection = await self._acquire(pool)
                try:
                    self._look(pool)
                    yield connection
                except asyncpg.InternalClientError:
                    connection.terminate()  # The driver has lost track of it; nobody shall get it again.
                    raise
                finally:
                    try:
                        await pool.release(connection, timeout=END_TIMEOUT_SECONDS)
                    finally:
                        self._look(pool)
        except StamplineError:
            raise
        except Exception as exc:
            ours = translate(exc, self._settings.postgres_url)
            if ours is None:
                raise
            raise ours from exc

    async def _acquire(self, pool: asyncpg.Pool[asyncpg.Record]) -> Connection:
        timeout_seconds = self._settings.database_command_timeout_seconds
        try:
            return await pool.acquire(timeout=timeout_seconds)
        except TimeoutError as exc:
            if pool.get_size() < pool.get_max_size():
                raise
            raise ServiceUnavailable(
                f"all {pool.get_max_size()} connections to PostgreSQL were in use for {timeout_seconds:g} s: "
                "set DATABASE_POOL_MAX_SIZE higher"
            ) from exc

    def _look(self, pool: asyncpg.Pool[asyncpg.Record]) -> None:
        self._monitor.look(size=pool.get_size(), free=pool.get_idle_size(), maximum=pool.get_max_size())

    async def _connect(self, *args: Any, **options: Any) -> GuardedConnection:
        """Make a connection for the pool, which also wants some when nobody has called: it replaces idle ones."""
        self.breaker.refuse_while_open(self._place)
        connection: GuardedConnection = await asyncpg.connect(*args, **options)
        connection.guard(self.query_metrics, self._settings.database_command_timeout_seconds)
        return connection


def tls_context(settings: Settings) -> ssl.SSLContext | None:
    """Return how to verify the server where ENABLE_SSL_DATABASE is on, else None.

    Raises:
        SettingsError: the CA certificate cannot be loaded.
    """
    if not settings.enable_ssl_database:
        return None
    try:
        return ssl.create_default_context(cafile=settings.postgres_ssl_ca)
    except OSError as exc:
        raise SettingsError(f"POSTGRES_SSL_CA: {settings.postgres_ssl_ca} is no CA certificate: {exc}") from exc


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


def loses_connection(exc: BaseException) -> bool:
    """Whether an error says that there is no connection to the server: the failures that the breaker counts."""
    # What the driver finds wrong with a value is an InterfaceError too.
    return isinstance(exc, _UNCONNECTED) and not refuses_data(exc)


def lacks_partition(exc: BaseException) -> bool:
    """Whether a table has no partition for a row, which PostgreSQL tells as a check without a name."""
    return isinstance(exc, asyncpg.CheckViolationError) and exc.constraint_name is None


class Double(NamedTuple):
    """A row that was refused because its table has one with such a key already, and what PostgreSQL says of the key."""

    table: str
    key: str


def find_double(exc: BaseException) -> Double | None:
    """Return which row is there twice, None where the error is another one."""
    if not isinstance(exc, asyncpg.UniqueViolationError):
        return None
    return Double(exc.table_name or "", exc.detail or "")


def translate(exc: BaseException, dsn: str) -> StamplineError | None:
    """Turn an error of asyncpg or of the network into ours, with one line that says what to do.

    `dsn` tells where the server is; its password is never used. Return None for what is not about the connection,
    the transaction or the schema: an error in the data or in our own code.
    """
    if refuses_data(exc):
        return None
    if isinstance(exc, asyncpg.InvalidAuthorizationSpecificationError):
        # pg_hba.conf has rules for connections with and without TLS.
        hint = ", or set ENABLE_SSL_DATABASE=true" if "no encryption" in str(exc) else ""
        return SettingsError(
            f"PostgreSQL refuses {_user(dsn)} ({_refusal(exc)}): check POSTGRES_USER and POSTGRES_PASSWORD{hint}"
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
        return _untrusted(exc, dsn)
    if isinstance(exc, ConnectionError) and "rejected SSL upgrade" in str(exc):
        return ServiceUnavailable(
            f"PostgreSQL at {_place(dsn)} does not speak TLS: switch it on there, or set ENABLE_SSL_DATABASE=false"
        )
    if isinstance(exc, _UNAVAILABLE):
        return ServiceUnavailable(
            f"PostgreSQL at {_place(dsn)} does not answer ({_reason(exc)}): "
            "start it or set POSTGRES_HOST and POSTGRES_PORT"
        )
    return None


def _untrusted(exc: ssl.SSLCertVerificationError, dsn: str) -> SettingsError:
    """Return the error for a certificate that we do not accept; each kind has another remedy."""
    subject, said = f"the certificate of PostgreSQL at {_place(dsn)}", exc.verify_message.rstrip(".")
    if exc.verify_code in _OTHER_NAME:
        return SettingsError(f"{subject} is for another name ({said}): set POSTGRES_HOST to one that it is for")
    if exc.verify_code in _OTHER_TIME:
        return SettingsError(
            f"{subject} is not valid today ({said}): renew it, or the CA in POSTGRES_SSL_CA; "
            "or is it the clock of this machine?"
        )
    return SettingsError(f"{subject} is not trusted ({said}): set POSTGRES_SSL_CA to the CA that signed it")


def _refusal(exc: BaseException) -> str:
    return "password" if isinstance(exc, asyncpg.InvalidPasswordError) else _first_line(exc)


def _first_line(exc: BaseException) -> str:
    """Return the message without the DETAIL and HINT that the driver adds on lines of their own."""
    return str(exc).partition("\n")[0]


def _reason(exc: BaseException) -> str:
    """Say in a few words why the server cannot be reached."""
    if isinstance(exc, asyncpg.InterfaceError) and exc.__context__ is not None and loses_connection(exc.__context__):
        # A ROLLBACK on a connection that is closed already; what closed it is the reason.
        return _reason(exc.__context__)
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
