"""What `projection_lag` tells is true: nothing where everything is visible, and a stop is seen as one."""

from __future__ import annotations

import asyncio
import json
import os
import pty
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import asyncpg
import pytest

from pipeline.kafka import partition_for
from pipeline.logreader import LogReader
from pipeline.topics import FILES_CHANGELOG, has_transactions, topic_name
from projections.watermarks import PROJECTIONS
from tests.fix_road import DEADLINE_SECONDS, NodeProcess, Road, environment, make_events

pytestmark = pytest.mark.integration

ROLES = ("hasher", "reducer", "projector")
_ROOT = Path(__file__).parents[2]
_LAG = "SELECT * FROM projection_lag WHERE projection = ANY ($1::text[])"
#: Nothing is missing, and somebody is there: rows behind, ms, status.
_CAUGHT_UP = (0, 0, "live")


async def read_lag(road: Road) -> dict[tuple[str, int], Any]:
    """Return the view by projection and partition."""
    return {(row["projection"], row["partition"]): row for row in await road.fetch(_LAG, PROJECTIONS)}


async def until_caught_up(road: Road) -> None:
    """Wait until all partitions of all projections are live, with nothing missing."""

    async def caught_up() -> bool:
        told = [(row["rows_behind"], row["lag_ms"], row["status"]) for row in (await read_lag(road)).values()]
        return told == [_CAUGHT_UP] * 4 * len(PROJECTIONS)

    await road.until(caught_up)


async def until_stalled(road: Road) -> None:
    """Wait until all partitions of all projections are stalled."""

    async def stalled() -> bool:
        return {row["status"] for row in (await read_lag(road)).values()} == {"stalled"}

    await road.until(stalled)


async def until_beaten(road: Road, times: int, *, partition: int = 0) -> list[dict[tuple[str, int], Any]]:
    """Wait until a partition's heart has beaten so often, and return what was seen of all until then."""
    seen: list[dict[tuple[str, int], Any]] = []
    beats: set[Any] = set()

    async def beaten() -> bool:
        [row] = await road.fetch(
            "SELECT heartbeat_at FROM projection_watermarks WHERE projection = 'files' AND partition = $1", partition
        )
        beats.add(row["heartbeat_at"])
        seen.append(await read_lag(road))
        return len(beats) > times

    await road.until(beaten)
    return seen


async def pass_time(road: Road, interval: timedelta) -> None:
    """Let everything that the watermarks tell of be so much older."""
    await road.fetch(
        "UPDATE stampline.watermarks SET heartbeat_at = heartbeat_at - $1::interval, "
        "caught_up_at = caught_up_at - $1::interval, event_time = event_time - $1::interval",
        interval,
    )


async def run_stampline(road: Road, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run a command to its end."""
    return await asyncio.to_thread(
        subprocess.run,
        [sys.executable, "-m", "pipeline", *arguments],
        cwd=_ROOT,
        env=environment(road.settings) | {"COLUMNS": "120"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=DEADLINE_SECONDS,
        check=False,
    )


@asynccontextmanager
async def locked_history(road: Road) -> AsyncIterator[None]:
    """Keep projectors from writing, without any effect on their watermarks."""
    connection = await asyncpg.connect(road.settings.postgres_url)
    try:
        async with connection.transaction():
            await connection.execute("LOCK TABLE stampline.file_history IN SHARE MODE")
            yield
    finally:
        await connection.close()


async def test_caught_up_is_exactly_nothing(road: Road) -> None:
    """Where all is visible the lag is 0 rows and 0 ms and stays so, though the log ends with markers that nobody
    sees, and also for partitions that never had an event; time that passes without events changes nothing.
    """
    road.start(*ROLES)
    await until_caught_up(road)
    await road.until_visible(await road.send(make_events(200, 20, seed=51)))
    await until_caught_up(road)
    seen = await until_beaten(road, 2)
    await pass_time(road, timedelta(hours=1))
    await until_caught_up(road)
    marks = {
        row["partition"]: row["feed_offset"]
        for row in await road.fetch("SELECT * FROM projection_watermarks WHERE projection = 'files'")
    }
    unseen = []
    for partition, feed_offset in marks.items():
        topic = topic_name(road.settings, FILES_CHANGELOG)
        async with LogReader(road.settings, topic, partition) as reader:
            unseen.append(await reader.find_end() - feed_offset)

    assert {(row["rows_behind"], row["lag_ms"], row["status"]) for look in seen for row in look.values()} == {
        _CAUGHT_UP
    }
    assert len(marks) == 4
    if await has_transactions(road.settings):
        assert all(count > 0 for count in unseen)


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL], ids=["SIGTERM", "SIGKILL"])
async def test_a_projector_that_is_gone_is_stalled(road: Road, how: signal.Signals) -> None:
    """Without a projector every partition is soon stalled and its lag grows, whether or not something is missing; the
    next projector brings it back to nothing.
    """
    road.start("hasher", "reducer")
    projector = road.start("projector")
    await road.until_visible(await road.send(make_events(100, 20, seed=52)))
    await until_caught_up(road)
    projector.process.send_signal(how)
    projector.process.wait(DEADLINE_SECONDS)
    await until_stalled(road)
    first, done = await read_lag(road), await run_stampline(road, "lag", "--json")
    second = {(row["projection"], row["partition"]): row for row in json.loads(done.stdout)}

    assert all(row["heartbeat_age_ms"] >= 10_000 for row in first.values())
    assert all(second[key]["lag_ms"] > row["lag_ms"] > 10_000 for key, row in first.items())
    assert done.returncode == 3
    assert done.stderr == ""

    positions = await road.send(make_events(100, 20, seed=53))
    road.start("projector")
    await road.until_visible(positions)
    await until_caught_up(road)

    async def all_are_live() -> bool:
        # The dead letters' partitions too, which have a heart of their own.
        return (await run_stampline(road, "lag")).returncode == 0

    await road.until(all_are_live)


async def test_a_backlog_is_told(road: Road) -> None:
    """A projector that is there and cannot keep up is catching up: rows are behind, and they grow older."""
    road.start(*ROLES)
    await road.until_visible(await road.send(make_events(100, 20, seed=54)))
    await until_caught_up(road)
    async with locked_history(road):
        positions = await road.send(make_events(400, 40, seed=55))

        async def catching_up() -> bool:
            return {row["status"] for row in (await read_lag(road)).values()} == {"catching_up"}

        await road.until(catching_up)
        first = await read_lag(road)
        seen = await until_beaten(road, 2)
        table = await run_stampline(road, "lag")

    assert all(row["rows_behind"] > 0 and row["lag_ms"] >= 2000 for row in first.values())
    assert sum(first["files", partition]["rows_behind"] for partition in range(4)) >= 400
    assert all(seen[-1][key]["lag_ms"] > row["lag_ms"] for key, row in first.items())
    assert table.returncode == 0
    assert table.stdout.count("catching_up") == 4 * len(PROJECTIONS)
    await road.until_visible(positions)
    await until_caught_up(road)


async def test_a_partition_that_fails_is_stalled(road: Road) -> None:
    """A partition whose batches fail is opened again and again, which is no sign of life; those that are idle go on
    beating. It comes back by itself.
    """
    projector = road.start(*ROLES)
    await until_caught_up(road)
    [event, *_] = make_events(1, 1, seed=56)
    failing = partition_for(event.uri.encode(), 4)
    await road.fetch("ALTER TABLE stampline.file_history RENAME COLUMN outcome TO hidden")
    positions = await road.send([event])

    async def statuses() -> dict[int, set[str]]:
        found: dict[int, set[str]] = {partition: set() for partition in range(4)}
        for (_, partition), row in (await read_lag(road)).items():
            found[partition].add(row["status"])
        return found

    async def stalled() -> bool:
        return await statuses() == {number: {"stalled" if number == failing else "live"} for number in range(4)}

    await road.until(lambda: projector.has_logged('"partition_failed"'))
    await road.until(stalled)
    for look in await until_beaten(road, 3, partition=(failing + 1) % 4):
        assert {row["status"] for (_, partition), row in look.items() if partition == failing} == {"stalled"}

    await road.fetch("ALTER TABLE stampline.file_history RENAME COLUMN hidden TO outcome")
    await road.until_visible(positions)
    await until_caught_up(road)


async def test_clocks_that_disagree_never_make_less_than_nothing(road: Road) -> None:
    """A host whose clock is ahead writes times of the future; what is told of them is 0."""
    node = road.start(*ROLES)
    await road.until_visible(await road.send(make_events(50, 20, seed=57)))
    await until_caught_up(road)
    node.terminate()
    await pass_time(road, timedelta(hours=-1))
    await road.fetch("UPDATE stampline.watermarks SET feed_end = feed_offset - 1")
    rows = (await read_lag(road)).values()

    assert {(row["rows_behind"], row["lag_ms"], row["heartbeat_age_ms"], row["status"]) for row in rows} == {
        (0, 0, 0, "live")
    }


async def test_a_partition_that_never_caught_up_has_an_age(road: Road) -> None:
    """Where nothing has ever been visible, the lag is how long a projector has been at it, and grows without one."""
    node: NodeProcess
    async with locked_history(road):
        positions = await road.send(make_events(200, 40, seed=58))
        node = road.start(*ROLES)

        async def behind() -> bool:
            rows = (await read_lag(road)).values()
            return len(rows) == 4 * len(PROJECTIONS) and all(row["rows_behind"] > 0 for row in rows)

        await road.until(behind)
        node.kill()
    marks = await road.fetch("SELECT event_time, caught_up_at FROM stampline.watermarks WHERE projection = 'files'")
    await until_stalled(road)

    assert {tuple(row) for row in marks} == {(None, None)}
    assert all(row["lag_ms"] > 10_000 for row in (await read_lag(road)).values())
    road.start(*ROLES)
    await road.until_visible(positions)
    await until_caught_up(road)


def watch_documents(road: Road, looks: int) -> tuple[list[Any], int]:
    """Return what `lag --watch --json` prints for so many looks, and its exit code after SIGTERM."""
    with start_watch(road, "--json", stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        documents = [json.loads(process.stdout.readline()) for _ in range(looks)]
        process.terminate()
        return documents, process.wait(DEADLINE_SECONDS)


def watch_terminal(road: Road, looks: int) -> int:
    """Watch on a terminal until a table was drawn so often; return the exit code after Ctrl-C."""
    master, terminal = pty.openpty()
    try:
        with start_watch(road, stdout=terminal) as process:
            os.close(terminal)
            output = b""
            while output.count(b"heartbeat_age_ms") < looks:
                output += os.read(master, 65536)
            process.send_signal(signal.SIGINT)
            return process.wait(DEADLINE_SECONDS)
    finally:
        os.close(master)


def start_watch(road: Road, *options: str, stdout: int) -> subprocess.Popen[bytes]:
    """Start `stampline lag --watch`."""
    return subprocess.Popen(
        [sys.executable, "-m", "pipeline", "lag", "--watch", "--interval-ms", "100", *options],
        cwd=_ROOT,
        env=environment(road.settings) | {"TERM": "xterm", "COLUMNS": "120", "LINES": "50"},
        stdin=subprocess.DEVNULL,
        stdout=stdout,
        # Whoever runs the tests in the background has SIGINT ignored, and so would this process.
        preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),  # noqa: PLW1509 - no thread has locks here
    )


async def test_watch_looks_again_and_again(road: Road) -> None:
    """`lag --watch --json` prints a document for each look, on a terminal a table that is drawn anew; SIGTERM ends it
    with exit code 0, Ctrl-C with 130.
    """
    road.start(*ROLES)
    await until_caught_up(road)
    looks, documents_code = await asyncio.to_thread(watch_documents, road, 3)
    terminal_code = await asyncio.to_thread(watch_terminal, road, 3)

    assert [{row["status"] for row in rows} for rows in looks] == [{"live"}] * 3
    assert (documents_code, terminal_code) == (0, 130)
