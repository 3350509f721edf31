"""Reading one's own write: in SQL, by the client, on the command line, each with the same answers."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import uuid
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit, urlunsplit

import asyncpg
import pytest
from pydantic import SecretStr

from pipeline.client import EventProducer, Position
from pipeline.errors import InvalidToken, ServiceUnavailable
from pipeline.events import FileEvent
from pipeline.settings import Settings
from pipeline.waiting import Answer, Waiter
from tests.fix_proxy import TcpProxy, through
from tests.fix_road import DEADLINE_SECONDS, Road, environment, make_events
from tests.fix_services import MakeSettings

pytestmark = pytest.mark.integration

ROLES = ("hasher", "reducer", "retry", "projector")
_ROOT = Path(__file__).parents[2]
#: An event that nobody has sent.
_NOT_YET = Position(1, 10**6).token


async def wait_in_sql(dsn: str, token: str | None, interval: str = "60 s") -> str:
    """Ask `wait_for` on a connection of its own."""
    connection = await asyncpg.connect(dsn)
    try:
        return str(await connection.fetchval("SELECT wait_for($1, $2::text::interval)", token, interval))
    finally:
        await connection.close()


async def wait_in_shell(settings: Settings, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run `stampline wait`."""
    return await asyncio.to_thread(
        subprocess.run,
        [sys.executable, "-m", "pipeline", "wait", *arguments],
        cwd=_ROOT,
        env=environment(settings),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=DEADLINE_SECONDS,
        check=False,
    )


async def until_live(road: Road) -> None:
    """Wait until all partitions are projected."""

    async def live() -> bool:
        [row] = await road.fetch("SELECT count(*) FROM projection_lag WHERE projection = 'files' AND status = 'live'")
        return bool(row["count"] == 4)

    await road.until(live)


def as_user(dsn: str, user: str, password: str) -> str:
    """Return a connection string for somebody else."""
    parts = urlsplit(dsn)
    return urlunsplit(parts._replace(netloc=f"{user}:{password}@{parts.netloc.rpartition('@')[2]}"))


@pytest.fixture
async def reader(database: str) -> AsyncIterator[str]:
    """The connection string of a user who is a reader and nothing else; the user is its name."""
    name = f"reader_{uuid.uuid4().hex[:12]}"
    connection = await asyncpg.connect(database)
    try:
        await connection.execute(f"CREATE ROLE {name} LOGIN PASSWORD 'read' IN ROLE stampline_reader")
        yield as_user(database, name, "read")
        await connection.execute("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = $1", name)
        await connection.execute(f"DROP ROLE {name}")
    finally:
        await connection.close()


def event(uri: str, number: int, **fields: Any) -> FileEvent:
    """Make an event with content of its own."""
    content = fields.pop("content", number.to_bytes(8, "big"))
    return FileEvent(
        event_id=f"{uri} {number}", uri=uri, op="modified", occurred_at=datetime.now(UTC), content=content, **fields
    )


async def test_an_event_that_is_visible_is_reached(road: Road, reader: str) -> None:
    """Whoever sent an event, and any reader, learns that it is visible, and then finds it."""
    road.start(*ROLES)
    settings = road.settings.model_copy(update={"postgres_dsn": SecretStr(reader)})
    async with EventProducer(settings) as producer:
        token = await producer.send(event("file:///a", 1))
        answer = await producer.wait(token, DEADLINE_SECONDS)
        rows = await road.fetch("SELECT version FROM files WHERE uri = 'file:///a'")
    shell = await wait_in_shell(settings, token, "--timeout", "30s")
    as_json = await wait_in_shell(settings, token, "--json")

    position = Position.parse(token)
    assert answer == Answer("reached", None, position.partition)
    assert [row["version"] for row in rows] == [1]
    assert await wait_in_sql(reader, token) == "reached"
    assert (shell.returncode, shell.stdout, shell.stderr) == (0, "reached\n", "")
    assert json.loads(as_json.stdout) == {
        "token": token,
        "verdict": "reached",
        "reason": None,
        "partition": position.partition,
        "since": None,
    }


async def test_a_rejected_event_comes_with_its_reason(road: Road, reader: str, tmp_path: Path) -> None:
    """A conflict, a content that is not there, an input that cannot be read, an event that was given up: each is
    rejected and tells why.
    """
    road.start(*ROLES)
    missing = (tmp_path / "missing").as_uri()
    await road.send_raw(b"file:///raw", b"no JSON", partition=3)
    sent = await road.send(
        [
            *(event("file:///c", number) for number in range(3)),
            event("file:///c", 3, expected_version=1),
            event(missing, 1, content=None),
            event("file:///g", 1, expected_version=5),
        ]
    )
    tokens = [sent[3].token, sent[4].token, sent[5].token, Position(3, 0).token]
    settings = road.settings.model_copy(update={"postgres_dsn": SecretStr(reader)})
    async with Waiter(settings) as waiter:
        answers = await asyncio.gather(*(waiter.wait(token, DEADLINE_SECONDS) for token in tokens))
    shell = await wait_in_shell(settings, tokens[0])

    assert [answer.verdict for answer in answers] == ["rejected"] * 4
    conflict, content, gave_up, undecodable = (answer.reason or "" for answer in answers)
    assert conflict == "conflict: expected version 1, is 3"
    assert content.startswith("content_missing")
    assert gave_up == "gave_up: expected version 5, is 0"
    assert undecodable.startswith("undecodable: ")
    assert [await wait_in_sql(reader, token) for token in tokens] == ["rejected"] * 4
    assert (shell.returncode, shell.stdout, shell.stderr) == (1, f"rejected: {conflict}\n", "")


async def test_a_deferred_event_is_followed(road: Road) -> None:
    """An event that came too early is reached when it is visible as what it was sent in again as."""
    road.start(*ROLES)
    async with EventProducer(road.settings) as producer:
        [early, _] = await producer.send_all([event("file:///d", 2, expected_version=1), event("file:///d", 1)])
        answer = await producer.wait(early.token, DEADLINE_SECONDS)
        rows = await road.fetch("SELECT version, event_id FROM files WHERE uri = 'file:///d'")
        outcomes = await road.fetch("SELECT outcome FROM file_history WHERE input_offset = $1", early.offset)

    assert answer.verdict == "reached"
    assert [tuple(row) for row in rows] == [(2, "file:///d 2")]
    assert "deferred" in {row["outcome"] for row in outcomes}
    assert await wait_in_sql(road.settings.postgres_url, early.token, "0 s") == "reached"


async def test_a_stalled_partition_is_named(road: Road) -> None:
    """Where nobody projects, a wait ends at once, with the partition and the last sign of life; what is visible stays
    reached.
    """
    projector = road.start(*ROLES)
    [visible] = await road.send([event("file:///s", 1)])
    await road.until_visible([visible])
    await until_live(road)
    projector.terminate()
    [token] = [position.token for position in await road.send([event("file:///s", 2)])]
    await road.fetch("UPDATE stampline.watermarks SET heartbeat_at = heartbeat_at - interval '1 hour'")
    [row] = await road.fetch(
        "SELECT min(heartbeat_at) AS since FROM projection_watermarks "
        "WHERE partition = $1 AND input_offset IS NOT NULL",
        visible.partition,
    )
    async with Waiter(road.settings) as waiter:
        answer = await waiter.wait(token, DEADLINE_SECONDS)
        before = await waiter.wait(visible.token, DEADLINE_SECONDS)
    shell = await wait_in_shell(road.settings, token)

    assert answer == Answer("stalled", None, visible.partition, row["since"])
    assert before.verdict == "reached"
    assert await wait_in_sql(road.settings.postgres_url, token) == "stalled"
    assert (shell.returncode, shell.stdout) == (3, "stalled\n")
    [line] = shell.stderr.splitlines()
    assert f"partition {visible.partition} since {row['since']}" in line
    assert "stampline worker projector" in line


async def test_an_event_that_does_not_come_is_a_timeout(road: Road) -> None:
    """A wait ends when its time is up, also for a partition that nobody knows."""
    road.start(*ROLES)
    await until_live(road)
    async with Waiter(road.settings) as waiter:
        answers = [await waiter.wait(token, 0.5) for token in (_NOT_YET, Position(77, 0).token)]
    shell = await wait_in_shell(road.settings, _NOT_YET, "--timeout", "500ms")

    assert answers == [Answer("timeout", None, 1), Answer("timeout", None, 77)]
    assert await wait_in_sql(road.settings.postgres_url, _NOT_YET, "0.2 s") == "timeout"
    assert (shell.returncode, shell.stdout) == (1, "timeout\n")
    [line] = shell.stderr.splitlines()
    assert "not visible after 0.5 s: look at `stampline lag`" in line


@pytest.mark.parametrize(
    "token", ["", "file-events", "file-events:1", "file-events:1:2:3", "file-events:-1:2", "file-events:1:٣", "x:1:2"]
)
async def test_what_is_no_token_is_said_at_once(settings: Settings, token: str) -> None:
    """SQL, client and command line refuse what is no token, and tell what one looks like."""
    with pytest.raises(asyncpg.InvalidParameterValueError, match="is no token") as refused:
        await wait_in_sql(settings.postgres_url, token)
    async with Waiter(settings) as waiter:
        with pytest.raises(InvalidToken, match="file-events:PARTITION:OFFSET"):
            await waiter.wait(token, 1)
    shell = await wait_in_shell(settings, token)

    assert "file-events:PARTITION:OFFSET" in str(refused.value.hint)
    assert (shell.returncode, shell.stdout) == (2, "")
    assert "is no token" in shell.stderr


@pytest.mark.parametrize("duration", ["0s", "soon", "-1s", "10 parsecs"])
def test_a_duration_that_is_none_is_a_mistake_of_the_caller(settings: Settings, duration: str) -> None:
    """`wait --timeout` says what a duration looks like, before it asks anybody."""
    shell = asyncio.run(wait_in_shell(settings, _NOT_YET, "--timeout", duration))

    assert (shell.returncode, shell.stdout) == (2, "")
    assert "is no duration: 500ms, 10s, 5m or 1h" in shell.stderr


async def test_waiting_inside_a_snapshot_is_refused(settings: Settings) -> None:
    """In a transaction that never sees anything new, `wait_for` says so instead of waiting in vain; null is no timeout
    and no token.
    """
    connection = await asyncpg.connect(settings.postgres_url)
    try:
        with pytest.raises(asyncpg.FeatureNotSupportedError, match="never sees what it waits for") as refused:
            async with connection.transaction(isolation="repeatable_read"):
                await connection.fetchval("SELECT wait_for($1, interval '1 s')", _NOT_YET)
        with pytest.raises(asyncpg.NullValueNotAllowedError, match="timeout is null"):
            await connection.fetchval("SELECT wait_for($1, null)", _NOT_YET)
    finally:
        await connection.close()
    with pytest.raises(asyncpg.InvalidParameterValueError, match="null is no token"):
        await wait_in_sql(settings.postgres_url, None)

    assert "READ COMMITTED" in str(refused.value.hint)


async def test_many_wait_at_once(road: Road, reader: str) -> None:
    """Two hundred waits of one process share a connection, forty sessions of SQL wait beside them, and everything is
    reached; afterwards nothing is asked any more.
    """
    road.start("hasher", "reducer")
    settings = road.settings.model_copy(update={"postgres_dsn": SecretStr(reader)})
    positions = await road.send(make_events(200, 50, seed=61))
    async with Waiter(settings) as waiter:
        waits = [asyncio.create_task(waiter.wait(position.token, DEADLINE_SECONDS)) for position in positions]
        sessions = [
            asyncio.create_task(wait_in_sql(road.settings.postgres_url, position.token, "90 s"))
            for position in positions[:40]
        ]

        async def all_wait() -> bool:
            [row] = await road.fetch(
                "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND query LIKE '%wait_for(%' "
                "AND pid <> pg_backend_pid() AND state = 'active'"
            )
            return bool(row["count"] >= 40)

        await road.until(all_wait)
        counted = await road.fetch(
            "SELECT count(*) FROM pg_stat_activity WHERE usename = $1", urlsplit(reader).username
        )
        road.start("projector")
        answers = await asyncio.gather(*waits)
        told = await asyncio.gather(*sessions)
        poller = waiter._poller
        assert poller is not None
        await asyncio.wait_for(poller, DEADLINE_SECONDS)

    assert [row["count"] for row in counted] == [1]
    assert {answer.verdict for answer in answers} == {"reached"}
    assert set(told) == {"reached"}
    await road.assert_exact(make_events(200, 50, seed=61), positions)


async def test_a_database_that_is_away_is_asked_again(road: Road, make_settings: MakeSettings, proxy: TcpProxy) -> None:
    """A wait survives that PostgreSQL goes away and comes back; one that ends before that says that it is away."""
    road.start(*ROLES)
    [position] = await road.send([event("file:///p", 1)])
    await road.until_visible([position])
    await proxy.refuse()
    async with Waiter(make_settings(postgres_dsn=through(road.settings.postgres_url, proxy))) as waiter:
        with pytest.raises(ServiceUnavailable, match="does not answer"):
            await waiter.wait(position.token, 1)
        waiting = asyncio.create_task(waiter.wait(position.token, DEADLINE_SECONDS))
        await proxy.heal()
        answer = await waiting
        proxy.swallow()
        with pytest.raises(ServiceUnavailable, match="did not answer within"):
            await waiter.wait(position.token, 0.5)
        proxy.cut()
        await proxy.heal()
        again = await waiter.wait(position.token, DEADLINE_SECONDS)

    assert (answer.verdict, again.verdict) == ("reached", "reached")


async def test_a_waiter_that_is_closed_lets_nobody_wait(settings: Settings) -> None:
    """Who still waits when the waiter is closed hears of it; closing it again does nothing."""
    waiter = Waiter(settings)
    waiting = asyncio.create_task(waiter.wait(_NOT_YET, DEADLINE_SECONDS))
    assert not (await asyncio.wait([waiting], timeout=0.5))[0]
    await waiter.aclose()
    await waiter.aclose()

    with pytest.raises(ServiceUnavailable, match="was closed"):
        await waiting
