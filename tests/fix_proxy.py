"""A TCP proxy that stands between a client and a server and disturbs them: it delays, cuts, refuses and black-holes.

Failure is a fixture: tests put it in front of PostgreSQL and of Apache Kafka.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import Final
from urllib.parse import parse_qsl, urlencode, urlsplit, urlunsplit

import pytest_asyncio

_CHUNK_BYTES: Final = 2**16


class TcpProxy:
    """Passes bytes from `127.0.0.1:port` to a server; run it with `run_proxy`."""

    def __init__(self, upstream: str | tuple[str, int]) -> None:
        self._upstream = upstream
        self._server: asyncio.Server | None = None
        self._writers: set[asyncio.StreamWriter] = set()
        self._flowing = asyncio.Event()
        self._flowing.set()
        #: The port it listens on, the same over `refuse` and `heal`.
        self.port = 0
        #: How long every piece of data is held back, in s.
        self.delay_seconds = 0.0

    @property
    def address(self) -> str:
        """Host and port to connect to."""
        return f"127.0.0.1:{self.port}"

    async def heal(self) -> None:
        """Take connections and pass everything on, at once; what a black hole has swallowed meanwhile is passed on."""
        self.delay_seconds = 0.0
        self._flowing.set()
        if self._server is None:
            self._server = await asyncio.start_server(self._serve, "127.0.0.1", self.port)
            self.port = self._server.sockets[0].getsockname()[1]

    def cut(self) -> None:
        """Reset every open connection; new ones are taken."""
        for writer in list(self._writers):
            writer.transport.abort()

    async def refuse(self) -> None:
        """Reset every open connection and refuse new ones, until `heal`."""
        server, self._server = self._server, None
        if server is not None:
            server.close()
        self.cut()
        self._flowing.set()

    def swallow(self) -> None:
        """Be a black hole: connections stay open and are taken, and nothing comes through, until `heal`."""
        self._flowing.clear()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._writers.add(writer)
        try:
            connect = (
                asyncio.open_unix_connection(self._upstream)
                if isinstance(self._upstream, str)
                else asyncio.open_connection(*self._upstream)
            )
            upstream_reader, upstream_writer = await connect
            self._writers.add(upstream_writer)
            try:
                pumps = [
                    asyncio.create_task(self._pump(reader, upstream_writer)),
                    asyncio.create_task(self._pump(upstream_reader, writer)),
                ]
                try:
                    await asyncio.wait(pumps, return_when=asyncio.FIRST_COMPLETED)
                finally:
                    for pump in pumps:
                        pump.cancel()
                    await asyncio.gather(*pumps, return_exceptions=True)
            finally:
                self._writers.discard(upstream_writer)
                upstream_writer.transport.abort()
        except OSError:
            pass  # The server is away: the client sees its connection end.
        finally:
            self._writers.discard(writer)
            writer.transport.abort()

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(OSError):
            while data := await reader.read(_CHUNK_BYTES):
                if self.delay_seconds:
                    await asyncio.sleep(self.delay_seconds)
                await self._flowing.wait()
                writer.write(data)
                await writer.drain()


@asynccontextmanager
async def run_proxy(upstream: str | tuple[str, int]) -> AsyncIterator[TcpProxy]:
    """Run a proxy in front of a host and port, or of the path of a Unix socket."""
    proxy = TcpProxy(upstream)
    await proxy.heal()
    try:
        yield proxy
    finally:
        await proxy.refuse()


@pytest_asyncio.fixture
async def proxy(database: str) -> AsyncIterator[TcpProxy]:
    """The network between a process and this test's database; `through` leads through it."""
    parts = urlsplit(database)
    options = dict(parse_qsl(parts.query))
    host, port = parts.hostname or options.get("host", "localhost"), parts.port or int(options.get("port", "5432"))
    async with run_proxy(f"{host}/.s.PGSQL.{port}" if host.startswith("/") else (host, port)) as running:
        yield running


def through(dsn: str, proxy: TcpProxy) -> str:
    """Return `dsn` with the proxy as its server."""
    parts = urlsplit(dsn)
    login, at, _ = parts.netloc.rpartition("@")
    options = [(name, value) for name, value in parse_qsl(parts.query) if name not in {"host", "port"}]
    return urlunsplit(parts._replace(netloc=f"{login}{at}{proxy.address}", query=urlencode(options)))
