"""How errors of PostgreSQL are told to people."""

from __future__ import annotations

import asyncio
import socket

import asyncpg
import pytest

from pipeline.errors import BatchAborted, ServiceUnavailable, SettingsError, StamplineError
from pipeline.postgres import PostgresConnectionManager, connecting, loses_connection, translate
from pipeline.settings import Settings

pytestmark = pytest.mark.unit

DSN = "postgresql://anna:s3cret@db.example:6543/stamps"


@pytest.mark.parametrize(
    ("exc", "kind", "message"),
    [
        (
            ConnectionRefusedError(111, "Connect call failed"),
            ServiceUnavailable,
            (
                "PostgreSQL at db.example:6543/stamps does not answer (connection refused): "
                "start it or set POSTGRES_HOST and POSTGRES_PORT"
            ),
        ),
        (OSError("Multiple exceptions: [Errno 111] x, [Errno 111] y"), ServiceUnavailable, "(connection refused)"),
        (FileNotFoundError(2, "No such file"), ServiceUnavailable, "(no socket there)"),
        (socket.gaierror(-2, "Name or service not known"), ServiceUnavailable, "(the host name is not known)"),
        (TimeoutError(), ServiceUnavailable, "(no answer in time)"),
        (asyncpg.InternalClientError("cannot switch to state 12"), ServiceUnavailable, "(cannot switch to state 12)"),
        (asyncpg.InterfaceError("connection is closed"), ServiceUnavailable, "(connection is closed)"),
        (asyncpg.ConnectionDoesNotExistError("gone"), ServiceUnavailable, "(gone)"),
        (asyncpg.TooManyConnectionsError("too many"), ServiceUnavailable, "(too many)"),
        (asyncpg.CannotConnectNowError("starting up"), ServiceUnavailable, "(starting up)"),
        (asyncpg.AdminShutdownError("terminating"), ServiceUnavailable, "(terminating)"),
        (asyncpg.DiskFullError("no space left"), ServiceUnavailable, "(no space left)"),
        (asyncpg.DeadlockDetectedError("deadlock detected"), BatchAborted, "deadlock detected"),
        (asyncpg.SerializationError("could not serialize"), BatchAborted, "could not serialize"),
        (asyncpg.IdleInTransactionSessionTimeoutError("idle"), BatchAborted, "idle"),
        (
            asyncpg.InvalidPasswordError('password authentication failed for user "anna"'),
            SettingsError,
            "PostgreSQL refuses user anna (password): check POSTGRES_USER and POSTGRES_PASSWORD",
        ),
        (
            asyncpg.InvalidCatalogNameError("no"),
            SettingsError,
            "database stamps does not exist: create it (createdb stamps) or set POSTGRES_DB",
        ),
        (asyncpg.UndefinedTableError("relation"), SettingsError, "run `stampline migrate upgrade`"),
        (asyncpg.InsufficientPrivilegeError("permission denied"), SettingsError, "permission denied"),
    ],
)
def test_errors_become_ours(exc: Exception, kind: type[StamplineError], message: str) -> None:
    """Every error of the connection is one line that says what to do, and never tells the password."""
    ours = translate(exc, DSN)

    assert type(ours) is kind
    assert message in str(ours)
    assert "\n" not in str(ours)
    assert "s3cret" not in str(ours)


@pytest.mark.parametrize(
    "exc", [asyncpg.DataError("bad"), asyncpg.CheckViolationError("bad"), KeyError("bug"), ValueError("bug")]
)
def test_errors_in_the_data_and_bugs_stay_what_they_are(exc: Exception) -> None:
    """The caller knows which record it was; a bug must not look like a fault of the server."""
    assert translate(exc, DSN) is None


@pytest.mark.parametrize(
    ("dsn", "place"),
    [
        ("postgresql://u@/db?host=/run/pg", "/run/pg:5432/db"),
        ("postgresql://u@/db?host=/run/pg&port=6000", "/run/pg:6000/db"),
        ("postgresql://h/db", "h:5432/db"),
        ("postgresql://a:b%40c@h:1/my%20db", "h:1/my db"),
    ],
)
def test_the_place_is_readable(dsn: str, place: str) -> None:
    """Messages tell where the server was looked for, for sockets as for hosts."""
    assert f"PostgreSQL at {place} does not answer" in str(translate(TimeoutError(), dsn))


def test_a_malformed_connection_string_is_not_repeated() -> None:
    """What cannot be read may hold the password anywhere, so neither the message nor the cause repeats it."""
    with pytest.raises(SettingsError, match="POSTGRES_DSN") as caught, connecting("postgresql://u:s3/cret@h/db"):
        raise ValueError("invalid literal for int() with base 10: 's3'")

    assert caught.value.__cause__ is None
    assert caught.value.__suppress_context__


@pytest.mark.parametrize(
    "exc",
    [
        OSError("gone"),
        ConnectionResetError("gone"),
        TimeoutError(),
        asyncpg.InterfaceError("connection is closed"),
        asyncpg.ConnectionDoesNotExistError("gone"),
        asyncpg.ConnectionFailureError("gone"),
        asyncpg.TooManyConnectionsError("too many"),
        asyncpg.CannotConnectNowError("starting up"),
        asyncpg.AdminShutdownError("terminating"),
        asyncpg.CrashShutdownError("terminating"),
    ],
)
def test_a_lost_connection_is_a_failure_for_the_breaker(exc: Exception) -> None:
    """The breaker counts what says that there is no connection; all of it is told as a service that is away."""
    assert loses_connection(exc)
    assert isinstance(translate(exc, DSN), ServiceUnavailable)


@pytest.mark.parametrize(
    "exc",
    [
        asyncpg.DataError("bad"),
        # What the driver finds before it sends anything.
        asyncpg.exceptions._base.DataError("bad"),
        asyncpg.UniqueViolationError("bad"),
        asyncpg.DeadlockDetectedError("deadlock"),
        asyncpg.QueryCanceledError("statement timeout"),
        asyncpg.DiskFullError("no space left"),
        asyncpg.InvalidPasswordError("password"),
        asyncpg.UndefinedTableError("relation"),
        asyncio.CancelledError(),
        BatchAborted(),
        KeyError("bug"),
    ],
)
def test_whoever_answers_is_there(exc: BaseException) -> None:
    """Errors in the data, in the transaction or in our own code, and a cancellation, are nothing to the breaker."""
    assert not loses_connection(exc)


def test_the_reason_is_what_came_first() -> None:
    """A ROLLBACK on a connection that a timeout has closed fails too, but that is not what is to be told."""
    rollback = asyncpg.InterfaceError("connection is closed")
    rollback.__context__ = TimeoutError()

    assert "(no answer in time)" in str(translate(rollback, DSN))


def test_a_pool_that_is_not_open_is_empty() -> None:
    """Its numbers can be asked for at any time."""
    stats = PostgresConnectionManager(Settings(database_pool_max_size=7)).get_pool_stats()

    assert stats == {
        "pool_size": 0,
        "pool_free": 0,
        "pool_max": 7,
        "used_connections": 0,
        "utilization_percent": 0.0,
        "exhaustion_threshold_percent": 90.0,
        "exhaustion_warning_count": 0,
    }
