"""The small process that holds local servers for another process, and never outlives it for long.

`pipeline.embedded` starts it as `python -m pipeline.guardian` in a session of its own, so that Ctrl-C in the terminal
does not reach the servers before the parent has drained. It reads requests from standard input and answers on
standard output, one JSON object in each line::

    {"do": "open", "broker": "kafka", "database": true, "data": null}
        {"say": "starting …"}                            any number of these before an answer
        {"done": {"broker": "127.0.0.1:…", "database": "postgresql://…"}}
    {"do": "check"} {"do": "pids"} {"do": "stop", "name": "broker"} {"do": "start", "name": "broker"}
        {"done": …}  or  {"failed": "one line for a person"}

At the end of the input, which is also what the death of the parent looks like, it stops the servers and removes the
temporary folder. If it is killed itself, Linux ends the servers; then only the temporary folder stays.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import shutil
import signal
import sys
import tempfile
from contextlib import AsyncExitStack, suppress
from pathlib import Path
from typing import Any, Final

from pipeline.errors import ServiceUnavailable
from pipeline.servers.brokers import Kafka, Tansu
from pipeline.servers.database import Postgres
from pipeline.servers.server import Server, hold_lock

# A guardian whose parent has just been killed still has to stop its servers.
_LOCK_SECONDS_MAX: Final = 45


class Guardian:
    """Runs the servers that one parent asked for."""

    def __init__(self) -> None:
        self._servers: dict[str, Server] = {}
        self._resources = AsyncExitStack()
        self._failures: list[str] = []

    async def work(self, requests: asyncio.Queue[dict[str, Any]]) -> None:
        """Answer requests, one after the other, without end."""
        while True:
            request = await requests.get()
            try:
                _tell(done=await self._perform(**request))
            except ServiceUnavailable as exc:
                self._failures.append(str(exc))
                _tell(failed=str(exc))

    async def close(self) -> None:
        """Stop all servers and remove the temporary folder."""
        await asyncio.gather(*(server.stop() for server in self._servers.values()))
        await self._resources.aclose()

    async def _perform(self, do: str, **arguments: Any) -> Any:
        match do:
            case "open":
                return await self._open(**arguments)
            case "check":
                return self._check()
            case "pids":
                processes = {name: server.process for name, server in self._servers.items()}
                return {name: process.pid for name, process in processes.items() if process is not None}
            case "stop":
                return await self._servers[arguments["name"]].stop()
            case "start":
                server = self._servers[arguments["name"]]
                await server.stop()
                return await server.start()
        raise AssertionError(f"no request {do!r}")

    async def _open(self, *, broker: str | None, database: bool, data: str | None) -> dict[str, str]:
        run = _make_run_folder()
        self._resources.callback(self._remove, run)
        folder = run
        if data is not None:
            folder = _make_data_folder(data)
            hint = f"{folder} is in use: stop the other stampline or choose another folder"
            await self._resources.enter_async_context(
                hold_lock(folder / ".lock", seconds_max=_LOCK_SECONDS_MAX, hint=hint, say=_say)
            )
        if broker == "embedded":
            self._servers["broker"] = Tansu(folder, say=_say)
        elif broker == "kafka":
            self._servers["broker"] = Kafka(folder, say=_say)
        if database:
            self._servers["database"] = Postgres(folder, run / "sockets", say=_say)
        try:
            async with asyncio.TaskGroup() as tasks:
                for server in self._servers.values():
                    tasks.create_task(_prepare_and_start(server))
        except ExceptionGroup as group:
            raise group.exceptions[0] from group
        return {name: server.address for name, server in self._servers.items()}

    def _check(self) -> None:
        for server in self._servers.values():
            if server.process is None or server.process.returncode is not None:
                raise ServiceUnavailable(f"{server.title} does not run any more ({server.fate}); its log: {server.log}")

    def _remove(self, run: Path) -> None:
        """Remove the temporary folder, but leave the logs that an error message has pointed to."""
        told = "\n".join(self._failures)
        logs = {server.log for server in self._servers.values() if str(server.log) in told}
        for path in set(run.iterdir()) - logs:
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink()
        # A folder with a log in it stays.
        with suppress(OSError):
            run.rmdir()


async def _prepare_and_start(server: Server) -> None:
    await server.prepare()
    await server.start()


def _make_run_folder() -> Path:
    """Make the temporary folder; its path is short, because that of a socket may have only about 100 characters."""
    run = Path(tempfile.mkdtemp(prefix="stampline-"))
    if os.geteuid() == 0:
        # PostgreSQL, which then runs as another user, has to pass through.
        run.chmod(0o711)
    return run


def _make_data_folder(path: str) -> Path:
    folder = Path(path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / ".lock").touch()
    except OSError as exc:
        raise ServiceUnavailable(f"{folder} cannot hold the data of the services: {exc.strerror}") from exc
    return folder


def _say(line: str) -> None:
    _tell(say=line)


def _tell(**message: object) -> None:
    # A parent that is gone hears nothing; the end of the input says so too.
    with suppress(BrokenPipeError):
        sys.stdout.write(json.dumps(message) + "\n")
        sys.stdout.flush()


async def _read(requests: asyncio.Queue[dict[str, Any]]) -> None:
    """Pass the requests on until the end of the input."""
    reader = asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    while line := await reader.readline():
        requests.put_nowait(json.loads(line))


async def _main() -> None:
    # The tries until a broker answers are no news.
    logging.getLogger("aiokafka").setLevel(logging.CRITICAL + 1)
    requests: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
    guardian = Guardian()
    reading = asyncio.create_task(_read(requests))
    working = asyncio.create_task(guardian.work(requests))
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, reading.cancel)
    try:
        await asyncio.wait({reading, working}, return_when=asyncio.FIRST_COMPLETED)
    finally:
        reading.cancel()
        working.cancel()
        ends = await asyncio.gather(reading, working, return_exceptions=True)
        await guardian.close()
    for end in ends:
        if isinstance(end, Exception):
            raise end


if __name__ == "__main__":
    asyncio.run(_main())
