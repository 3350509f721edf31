"""The meter: runs the processes of a system, watches how far they come, and reads their CPU time from the system.

Everything is taken between two marks: the first look that finds a tenth of the events finished, when all processes
are warm, and the first that finds all of them. Processes are told apart from those of other people, whose load makes
a measurement worthless.
"""

from __future__ import annotations

import asyncio
import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Final

import psutil
from msgspec import Struct

from pipeline.errors import StamplineError

_SAMPLE_SECONDS: Final = 0.1
_STALL_SECONDS_MAX: Final = 60.0
_STOP_SECONDS_MAX: Final = 20.0
_WARM_SHARE: Final = 0.1
_PR_SET_PDEATHSIG: Final = 1
_KERNEL_THREADS_PID: Final = 2
_MICRO: Final = 1e6


@dataclass(frozen=True, slots=True)
class Stage:
    """One process of a system.

    Args:
        name: what the report calls it.
        command: the arguments of Python.
        environment: what is added to ours.
        progress: tells how many events it has finished, durably.
    """

    name: str
    command: Sequence[str]
    environment: Mapping[str, str]
    progress: Callable[[], Awaitable[int]]


class Measured(Struct, frozen=True):
    """What one pass came to; times are in s, and rates between the two marks.

    `warm` is false where the run was too short for a first mark, so that everything counts from the start.
    `cpu_us_per_event` has each process of the system, by the events that it has finished itself between the marks, and
    the services, by those that the last process has; None = not measured. `samples` are (s since the start, events).
    """

    events_per_second: float
    warm: bool
    seconds: float
    total_seconds: float
    foreign_load_percent: float | None
    cpu_us_per_event: dict[str, float | None]
    samples: list[tuple[float, int]]


@dataclass(frozen=True, slots=True)
class _Mark:
    at: float
    finished: dict[str, int]
    cpu_seconds: dict[str, float]
    foreign_seconds: float


async def measure(stages: Sequence[Stage], *, events: int, services: Mapping[str, int | None], logs: Path) -> Measured:
    """Run the stages together until the last of them has finished all events, then end them.

    Args:
        stages: the processes, the last one being the one whose progress counts.
        events: how many there are.
        services: the process ids of the servers by name; None = they run elsewhere.
        logs: the folder for what the processes say.

    Raises:
        StamplineError: a process ended or stood still; names its log.
    """
    with run_processes(stages, logs) as running:
        pids = {name: process.pid for name, process in running.items()}
        pids |= {name: pid for name, pid in services.items() if pid is not None}
        started = time.monotonic()
        samples: list[tuple[float, int]] = []
        mark = await _mark(started, stages, 0, pids)
        warm = False
        moved = started
        while not samples or samples[-1][1] < events:
            await asyncio.sleep(_SAMPLE_SECONDS)
            finished = await stages[-1].progress()
            now = time.monotonic()
            if not samples or finished > samples[-1][1]:
                moved = now
            samples.append((round(now - started, 3), finished))
            if not warm and _WARM_SHARE * events <= finished < events:
                warm, mark = True, await _mark(now, stages, finished, pids)
            _check(running, logs, stalled_seconds=now - moved)
        end = await _mark(now, stages, finished, pids)
    return _difference(mark, end, samples, services, warm=warm, last=stages[-1].name)


async def _mark(at: float, stages: Sequence[Stage], finished: int, pids: Mapping[str, int]) -> _Mark:
    # The CPU first: it goes with the moment and the progress that are known already.
    cpu_seconds = {name: _cpu_seconds(pid) for name, pid in pids.items()}
    foreign = _busy_seconds() - _kernel_seconds() - sum(cpu_seconds.values()) - _own_seconds()
    progress = {stage.name: await stage.progress() for stage in stages[:-1]}
    return _Mark(at, progress | {stages[-1].name: finished}, cpu_seconds, foreign)


def _difference(
    begin: _Mark,
    end: _Mark,
    samples: list[tuple[float, int]],
    services: Mapping[str, int | None],
    *,
    warm: bool,
    last: str,
) -> Measured:
    seconds = end.at - begin.at
    done = {name: end.finished[name] - begin.finished[name] for name in end.finished}
    cpu: dict[str, float | None] = dict.fromkeys([*end.finished, *services])
    for name in end.cpu_seconds:
        # A process that had finished everything before the first mark has no events to share its time among.
        if events := done.get(name, done[last]):
            cpu[name] = round((end.cpu_seconds[name] - begin.cpu_seconds[name]) * _MICRO / events, 2)
    foreign = (end.foreign_seconds - begin.foreign_seconds) / seconds / (os.cpu_count() or 1)
    return Measured(
        events_per_second=round(done[last] / seconds, 1),
        warm=warm,
        seconds=round(seconds, 3),
        total_seconds=samples[-1][0],
        foreign_load_percent=None if None in services.values() else round(max(0.0, foreign) * 100, 1),
        cpu_us_per_event=cpu,
        samples=samples,
    )


def foreign_seconds(pids: Sequence[int]) -> float:
    """Return the CPU time so far of all but the kernel, these processes, and this one with its children that ended."""
    own = sum(psutil.Process().cpu_times()[:4])
    return _busy_seconds() - _kernel_seconds() - own - sum(_cpu_seconds(pid) for pid in pids)


def _check(running: Mapping[str, subprocess.Popen[bytes]], logs: Path, *, stalled_seconds: float) -> None:
    for name, process in running.items():
        if process.poll() is not None:
            raise StamplineError(f"{name} has ended with status {process.returncode}; its log: {_log(logs, name)}")
    if stalled_seconds > _STALL_SECONDS_MAX:
        raise StamplineError(f"no progress for {_STALL_SECONDS_MAX:g} s; the logs: {logs}")


@contextmanager
def run_processes(stages: Sequence[Stage], logs: Path) -> Iterator[dict[str, subprocess.Popen[bytes]]]:
    """Start a process for each stage; end them all, the first one first, so that each can drain."""
    running: dict[str, subprocess.Popen[bytes]] = {}
    try:
        for stage in stages:
            with _log(logs, stage.name).open("ab") as log:
                running[stage.name] = subprocess.Popen(
                    [sys.executable, *stage.command],
                    env={**os.environ, **stage.environment},
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    preexec_fn=_end_with_parent(),  # noqa: PLW1509 - calls one system call, and we have no threads' locks
                )
        yield running
    finally:
        for process in running.values():
            process.terminate()
        for process in running.values():
            try:
                process.wait(_STOP_SECONDS_MAX)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _end_with_parent() -> Callable[[], object] | None:
    """Make what a child calls first: a bench that is killed takes it along, for its services are gone as well."""
    if sys.platform != "linux":
        return None
    return partial(ctypes.CDLL(None).prctl, _PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


def _log(logs: Path, name: str) -> Path:
    return logs / f"{name}.log"


def _cpu_seconds(pid: int) -> float:
    """Return the CPU time of a process with its children, those that have ended too."""
    seconds = 0.0
    with suppress(psutil.NoSuchProcess):
        process = psutil.Process(pid)
        for member in (process, *process.children(recursive=True)):
            with suppress(psutil.NoSuchProcess):
                seconds += sum(member.cpu_times()[:4])
    return seconds


def _own_seconds() -> float:
    """Return the CPU time of this process without its children."""
    return sum(psutil.Process().cpu_times()[:2])


def _busy_seconds() -> float:
    """Return the CPU time that all processes of the machine took, and what the hypervisor took away."""
    times = psutil.cpu_times()
    return float(sum(getattr(times, name, 0.0) for name in ("user", "nice", "system", "steal")))


def _kernel_seconds() -> float:
    """Return the CPU time of the kernel's own threads: disk and network, which work for us as for others."""
    return sum(
        sum(process.info["cpu_times"][:2])
        for process in psutil.process_iter(["ppid", "cpu_times"])
        if process.info["ppid"] == _KERNEL_THREADS_PID and process.info["cpu_times"]
    )
