"""One server process: prepared, started, asked whether it answers, and stopped.

Which servers run, and until when, is the guardian's business. They listen on 127.0.0.1 or on a Unix socket, never on a
network. Imports errors only, of ours.
"""

from __future__ import annotations

import asyncio
import ctypes
import fcntl
import os
import signal
import sys
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from functools import partial
from pathlib import Path
from typing import IO, ClassVar, Final

from pipeline.errors import ServiceUnavailable

Say = Callable[[str], None]

_PREPARE_SECONDS_MAX: Final = 120
_START_SECONDS_MAX: Final = 120
_STOP_SECONDS_MAX: Final = 20
_PR_SET_PDEATHSIG: Final = 1


class Server(ABC):
    """One server process: its state in `folder`, all that it says in `log`.

    Raises:
        ServiceUnavailable: from every method, with one line that says what to do and where the log is.
    """

    title: str
    stop_signal = signal.SIGTERM
    #: What the process finds in its environment; None = what the guardian finds.
    environment: ClassVar[dict[str, str] | None] = None

    def __init__(self, folder: Path, *, log: str, say: Say) -> None:
        self.folder = folder
        self.log = folder / log
        self.process: asyncio.subprocess.Process | None = None
        self._say = say
        self._user: str | None = None

    @property
    @abstractmethod
    def address(self) -> str:
        """What a client connects to; the same after each restart."""

    @abstractmethod
    async def prepare(self) -> None:
        """Do once what the first start needs: fetch, format, check."""

    @abstractmethod
    def _command(self) -> list[str]: ...

    @abstractmethod
    async def _answers(self) -> bool: ...

    async def start(self) -> None:
        """Start the process and wait until it answers requests, not just until its port is open."""
        self._say(f"starting {self.title} on {self.address} (log: {self.log})")
        self.process = await self._spawn(*self._command())
        try:
            async with asyncio.timeout(_START_SECONDS_MAX):
                while not await self._answers():
                    if self.process.returncode is not None:
                        raise ServiceUnavailable(f"{self.title} did not start ({self.fate}); its log: {self.log}")
                    await asyncio.sleep(0.05)
        except TimeoutError as exc:
            raise ServiceUnavailable(
                f"{self.title} does not answer after {_START_SECONDS_MAX} s; its log: {self.log}"
            ) from exc

    async def stop(self) -> None:
        """End the process, cleanly if it can; it may have ended before."""
        process = self.process
        if process is None or process.returncode is not None:
            return
        # A paused process takes its signal only when it goes on.
        for number in (self.stop_signal, signal.SIGCONT):
            # Not `process.send_signal`: it polls, and may take the exit status away from asyncio.
            with suppress(ProcessLookupError):
                os.kill(process.pid, number)
        try:
            async with asyncio.timeout(_STOP_SECONDS_MAX):
                await process.wait()
        except TimeoutError:
            process.kill()
            await process.wait()

    @property
    def fate(self) -> str:
        """How the process ended, in words."""
        status = None if self.process is None else self.process.returncode
        if status is None:
            return "it does not run"
        return f"ended by {signal.Signals(-status).name}" if status < 0 else f"ended with status {status}"

    async def _spawn(self, *command: str) -> asyncio.subprocess.Process:
        with self.log.open("ab") as log:
            return await asyncio.create_subprocess_exec(
                *command,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd="/",
                env=self.environment,
                user=self._user,
                group=self._user,
                extra_groups=[] if self._user else None,
                # The guardian stops its servers; this is for the day when somebody kills the guardian.
                preexec_fn=_end_with_parent(self.stop_signal),
            )

    async def _run(self, *command: str, hint: str, seconds_max: float = _PREPARE_SECONDS_MAX) -> None:
        process = await self._spawn(*command)
        try:
            async with asyncio.timeout(seconds_max):
                status: int | str = await process.wait()
        except TimeoutError:
            status = f"still running after {seconds_max} s"
        finally:
            if process.returncode is None:
                process.kill()
                await process.wait()
        if status != 0:
            raise ServiceUnavailable(f"{hint} (`{Path(command[0]).name}`: {status}); its log: {self.log}")


@asynccontextmanager
async def hold_lock(path: Path, *, seconds_max: float, hint: str, say: Say) -> AsyncIterator[None]:
    """Hold the lock on a file; it is free again when this process ends, however it ends.

    Raises:
        ServiceUnavailable: with `hint`, where another process keeps it for longer than `seconds_max`.
    """
    with path.open("ab") as file:
        try:
            async with asyncio.timeout(seconds_max):
                if not _try_lock(file):
                    say(f"waiting for the process that holds {path}")
                while not _try_lock(file):  # noqa: ASYNC110 - another process's lock wakes nobody
                    await asyncio.sleep(0.05)
        except TimeoutError as exc:
            raise ServiceUnavailable(f"{hint} ({path} is locked by another process)") from exc
        yield


def _try_lock(file: IO[bytes]) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _end_with_parent(number: int) -> Callable[[], object] | None:
    """Make what a child calls before it becomes a server, so that it gets the signal when the guardian is gone."""
    if sys.platform != "linux":
        return None
    return partial(ctypes.CDLL(None).prctl, _PR_SET_PDEATHSIG, number, 0, 0, 0)
