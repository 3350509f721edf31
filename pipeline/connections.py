"""The class of our connections: asyncpg's, which also measures its statements and is bounded where asyncpg is not."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterator, Sized
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any, Final, TypeAlias, TypeVar

import asyncpg

from pipeline.querymetrics import QueryMetrics

if TYPE_CHECKING:  # It is generic in its stubs only.
    _Connection: TypeAlias = asyncpg.Connection[asyncpg.Record]
else:
    _Connection = asyncpg.Connection

_T = TypeVar("_T")

#: Longest it takes to end what a connection was used for, in s: once for a ROLLBACK and once for giving it back. Both
#: are short for a server that answers. One that does not must not keep a cancelled batch, and with it a partition that
#: another process waits for, as long as a statement may take.
END_TIMEOUT_SECONDS: Final = 3.0


class GuardedConnection(_Connection):
    """A connection of the pool. Cursors and statements prepared by hand are not measured."""

    #: Where its statements are noted, and how long a COPY may take, in s; `guard` sets both.
    _metrics: QueryMetrics | None = None
    _copy_timeout_seconds: float | None = None

    def guard(self, metrics: QueryMetrics, copy_timeout_seconds: float) -> None:
        """Begin to measure and to bound, once it is connected."""
        self._metrics = metrics
        self._copy_timeout_seconds = copy_timeout_seconds

    async def execute(self, query: str, *args: Any, timeout: float | None = None) -> str:  # noqa: ASYNC109
        """Run a command; see asyncpg. BEGIN, COMMIT, ROLLBACK and the reset of the session come here too."""
        if timeout is None and query.startswith("ROLLBACK"):
            timeout = END_TIMEOUT_SECONDS
        return await self._measure(query, super().execute(query, *args, timeout=timeout), _touched)

    async def fetch(self, query: str, *args: Any, **options: Any) -> Any:
        """Return all rows; see asyncpg."""
        return await self._measure(query, super().fetch(query, *args, **options), _length)

    async def fetchrow(self, query: str, *args: Any, **options: Any) -> Any:
        """Return the first row; see asyncpg."""
        return await self._measure(query, super().fetchrow(query, *args, **options), _one)

    async def fetchval(self, query: str, *args: Any, **options: Any) -> Any:
        """Return a value of the first row; see asyncpg."""
        return await self._measure(query, super().fetchval(query, *args, **options), _one)

    async def copy_records_to_table(self, table_name: str, **options: Any) -> str:
        """Copy rows into a table; see asyncpg.

        asyncpg 0.32 looks at neither its timeout nor the end of the connection while it waits for room to send: a COPY
        larger than the buffers on the way never ended where the server had gone. Here it ends.

        Raises:
            ConnectionResetError: the connection was lost.
            TimeoutError: it took too long.
        """
        schema_name = options.get("schema_name")
        table = f"{schema_name}.{table_name}" if schema_name else table_name
        try:
            async with asyncio.timeout(self._copy_timeout_seconds) as bound:
                with self._expiring(bound):
                    copying = super().copy_records_to_table(table_name, **options)
                    return await self._measure(f"COPY {table} FROM STDIN", copying, _touched)
        except (TimeoutError, AttributeError) as exc:
            # AttributeError: it told the server that it gave up, by a transport that is no more.
            if not self.is_closed():
                raise
            raise ConnectionResetError("the connection was lost") from exc

    @contextmanager
    def _expiring(self, bound: asyncio.Timeout) -> Iterator[None]:
        """Let the time be up when the connection is lost."""

        def expire(_connection: object) -> None:
            with suppress(RuntimeError):  # It is over already.
                bound.reschedule(0)

        self.add_termination_listener(expire)
        try:
            yield
        finally:
            self.remove_termination_listener(expire)

    async def _measure(self, statement: str, running: Awaitable[_T], count: Callable[[_T], int]) -> _T:
        started = time.perf_counter()
        rows = 0
        try:
            result = await running
            rows = count(result)
            return result
        finally:
            if self._metrics is not None:
                self._metrics.record(statement, (time.perf_counter() - started) * 1000, rows)


def _touched(status: str) -> int:
    """Return how many rows a command touched: the last word of its status, where it has a number."""
    word = status.rpartition(" ")[2]
    return int(word) if word.isdecimal() else 0


def _length(rows: Sized) -> int:
    return len(rows)


def _one(row: object) -> int:
    return int(row is not None)
