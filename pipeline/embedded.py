"""Local services for one laptop and for the tests: a broker and PostgreSQL, started and stopped with this process.

The servers are children of a small process of their own, `pipeline.guardian`, which ends them when this process ends,
however it ends. This module is the side that asks. Imports errors only, of ours.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Literal

from pipeline.errors import ServiceUnavailable, StamplineError
from pipeline.servers.database import find_programs

Broker = Literal["embedded", "kafka"]
ServerName = Literal["broker", "database"]

# More than the guardian needs to end a server that does not want to end.
_CLOSE_SECONDS_MAX: Final = 60


@dataclass(frozen=True)
class Services:
    """Running services: their addresses, and the means to disturb them in a test.

    The addresses hold until the end, also over `stop` and `start`.
    """

    #: None where no broker was asked for.
    kafka_bootstrap_servers: str | None
    #: None where no database was asked for.
    postgres_dsn: str | None
    _guardian: _GuardianProcess | None = field(default=None, repr=False, compare=False)

    @property
    def pids(self) -> dict[str, int]:
        """The process id of each server by its name, `broker` or `database`; the last one, where it has ended."""
        pids: dict[str, int] = self._ask("pids")
        return pids

    def check(self) -> None:
        """Make sure that every server still runs.

        Raises:
            ServiceUnavailable: names the one that does not, and its log.
        """
        self._ask("check")

    def stop(self, name: ServerName) -> None:
        """Stop one server, cleanly, and wait for its end; there is no harm in stopping it twice."""
        self._ask("stop", name=name)

    def start(self, name: ServerName) -> None:
        """Start one server again, at the same address and with its data; one that still runs is stopped first.

        Raises:
            ServiceUnavailable: it does not start.
        """
        self._ask("start", name=name)

    def _ask(self, do: str, **arguments: object) -> Any:
        if self._guardian is None:
            raise StamplineError("these services were not started here and can be neither watched nor stopped")
        return self._guardian.ask(do, **arguments)


@contextmanager
def run_services(
    *, broker: Broker | None, database: bool, data: Path | None, say: Callable[[str], None]
) -> Iterator[Services]:
    """Run a broker, a database or both until the context ends, or until this process does.

    Args:
        broker: `embedded` is there at once and forgets all at its end; `kafka` needs Java.
        database: whether to run PostgreSQL.
        data: the folder that keeps their state for the next time; None = a temporary one, removed at the end.
        say: gets one line for each step.

    Raises:
        ServiceUnavailable: a service does not start; says what to do and where its log is.
        StamplineError: the embedded broker cannot keep data.
    """
    if broker == "embedded" and data is not None:
        raise StamplineError("the embedded broker keeps everything in memory: use --broker kafka with a data folder")
    guardian = _GuardianProcess(say)
    try:
        place = None if data is None else str(data.expanduser().resolve())
        addresses = guardian.ask("open", broker=broker, database=database, data=place)
        yield Services(addresses.get("broker"), addresses.get("database"), guardian)
    finally:
        guardian.close()


def find_psql() -> str | None:
    """Return a psql to call: the one on the PATH, else the one in the wheel, else None."""
    programs = find_programs()
    return shutil.which("psql") or (str(programs / "psql") if programs is not None else None)


class _GuardianProcess:
    """The parent's end of the two pipes."""

    def __init__(self, say: Callable[[str], None]) -> None:
        self._say = say
        self._lock = threading.Lock()
        self._complaints = tempfile.TemporaryFile()  # noqa: SIM115 - closed in close()
        self._process = subprocess.Popen(
            [sys.executable, "-m", "pipeline.guardian"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._complaints,
            # Where `pipeline` can be imported from, wherever this process was started.
            cwd=Path(__file__).parents[1],
            start_new_session=True,
        )

    def ask(self, do: str, **arguments: object) -> Any:
        """Send a request and wait for its answer; the guardian bounds how long that takes."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with self._lock, suppress(BrokenPipeError):
            self._process.stdin.write(json.dumps({"do": do, **arguments}).encode() + b"\n")
            self._process.stdin.flush()
            while line := self._process.stdout.readline():
                message = json.loads(line)
                if "say" in message:
                    self._say(message["say"])
                elif "failed" in message:
                    raise ServiceUnavailable(message["failed"])
                else:
                    return message["done"]
        raise ServiceUnavailable(f"the process that holds the local services has ended: {self._last_complaint()}")

    def close(self) -> None:
        """Let the guardian stop the servers and wait for its end."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with suppress(BrokenPipeError):
            self._process.stdin.close()
        try:
            self._process.wait(_CLOSE_SECONDS_MAX)
        except subprocess.TimeoutExpired:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
        finally:
            self._process.stdout.close()
            self._complaints.close()

    def _last_complaint(self) -> str:
        self._complaints.seek(0)
        lines = self._complaints.read().decode(errors="replace").strip().splitlines()
        return lines[-1] if lines else "it was killed"
