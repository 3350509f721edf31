"""The command line, as a person calls it: results on standard output, one clear line for what is wrong."""

from __future__ import annotations

import asyncio
import json
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import asyncpg
import pytest
from aiokafka.admin import NewTopic

from pipeline.client import Position
from pipeline.embedded import run_services
from pipeline.settings import Settings
from pipeline.topics import admin_client, create_topics
from tests.fix_road import DEADLINE_SECONDS, Road, environment, make_events
from tests.fix_services import MakeSettings, with_database

pytestmark = pytest.mark.integration

_ROOT = Path(__file__).parents[2]


def stampline(
    settings: Settings | None, *arguments: str, variables: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run a command to its end."""
    env = (environment(settings) if settings is not None else environment(Settings())) | (variables or {})
    return subprocess.run(
        [sys.executable, "-m", "pipeline", *arguments],
        cwd=_ROOT,
        env=env,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=DEADLINE_SECONDS,
        check=False,
    )


def assert_one_line(done: subprocess.CompletedProcess[str], *texts: str) -> None:
    """The command failed with exit code 1 and one line that holds these texts."""
    lines = done.stderr.strip().splitlines()

    assert done.returncode == 1, done.stderr
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith("stampline: ")
    for text in texts:
        assert text in lines[0]


@pytest.fixture
def closed_port() -> int:
    """A port of this machine that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@pytest.fixture(scope="module")
def locked_database() -> Iterator[str]:
    """A PostgreSQL that asks role `locked` for a password."""
    with run_services(broker=None, database=True, data=None, say=print) as services:
        assert services.postgres_dsn is not None
        yield services.postgres_dsn


@pytest.mark.parametrize(
    "arguments", [("worker", "hasher"), ("scan", "."), ("topics", "create"), ("topics", "check"), ("verify",)]
)
def test_a_missing_broker_is_one_line(closed_port: int, arguments: tuple[str, ...]) -> None:
    """Where no broker answers, every command says so, names the address and what to set, and ends with 1."""
    address = f"127.0.0.1:{closed_port}"

    assert_one_line(
        stampline(None, *arguments, variables={"KAFKA_BOOTSTRAP_SERVERS": address}),
        f"Kafka at {address} does not answer",
        "KAFKA_BOOTSTRAP_SERVERS",
    )


async def test_a_missing_database_server_is_one_line(make_settings: MakeSettings, closed_port: int) -> None:
    """Where no PostgreSQL answers, the projector does not start and says what to set."""
    settings = make_settings(postgres_dsn=f"postgresql://a@127.0.0.1:{closed_port}/b")
    await create_topics(settings)

    assert_one_line(stampline(settings, "worker", "projector"), "connection refused", "POSTGRES_HOST")


async def test_a_missing_database_is_one_line(make_settings: MakeSettings, database: str) -> None:
    """A database that does not exist is named, with the command that makes it."""
    settings = make_settings(postgres_dsn=with_database(database, "nowhere"))
    await create_topics(settings)

    assert_one_line(stampline(settings, "worker", "projector"), "database nowhere does not exist", "createdb nowhere")


async def test_a_wrong_password_is_one_line(make_settings: MakeSettings, locked_database: str) -> None:
    """A wrong password is said without showing it, with the variables to check."""
    connection = await asyncpg.connect(locked_database)
    try:
        await connection.execute("CREATE ROLE locked LOGIN PASSWORD 'right'")
        path = await connection.fetchval("SHOW hba_file")
        await connection.execute("CREATE TEMP TABLE rules (line text)")
        await connection.execute("INSERT INTO rules VALUES ('local all locked scram-sha-256'), ('local all all trust')")
        await connection.execute(f"COPY rules TO '{path}'")
        await connection.execute("SELECT pg_reload_conf()")
    finally:
        await connection.close()
    settings = make_settings(postgres_dsn=locked_database.replace("postgres@", "locked:wrong@"))
    await create_topics(settings)
    done = stampline(settings, "worker", "projector")

    assert_one_line(done, "refuses user locked (password)", "POSTGRES_PASSWORD")
    assert "wrong" not in done.stderr


async def test_a_database_without_tables_is_one_line(make_settings: MakeSettings, locked_database: str) -> None:
    """A database that was never migrated is told apart from a missing one, with the command that helps."""
    settings = make_settings(postgres_dsn=locked_database)
    await create_topics(settings)

    assert_one_line(stampline(settings, "worker", "projector"), "stampline migrate upgrade")


async def test_another_partition_count_is_one_line(settings: Settings) -> None:
    """A topic with other partitions than its neighbours is named with both counts, and no role starts on it."""
    name = settings.kafka_topic_prefix + "file-stamps"
    async with admin_client(settings) as client:
        await client.create_topics([NewTopic(name, 3, 1)])
    await create_topics(settings)
    checked = stampline(settings, "topics", "check", "--json")

    assert_one_line(stampline(settings, "worker", "hasher"), f"topic {name} has 3 partitions", "has 8")
    assert checked.returncode == 3
    assert [json.loads(line)["partitions"] for line in checked.stdout.splitlines()] == [8, 3, 8, 8, 8]


def test_wrong_settings_are_all_told_by_name() -> None:
    """Every wrong variable is a line of its own with its name, before anything starts."""
    done = stampline(None, "worker", "hasher", variables={"POSTGRES_PORT": "x", "ALLOWED_ROOTS": "/nowhere"})

    assert done.returncode == 1
    assert [line.split(":")[1].strip() for line in done.stderr.splitlines()] == ["POSTGRES_PORT", "ALLOWED_ROOTS"]


def test_usage_errors_end_with_2() -> None:
    """An unknown role or command is a usage error."""
    assert stampline(None, "worker", "baker").returncode == 2
    assert stampline(None, "bake").returncode == 2


@pytest.fixture
def kafka_is_here() -> None:
    """Fail, rather than skip, where the tests were told to use Apache Kafka and cannot."""
    missing = [name for name in ("java", "mvn") if shutil.which(name) is None]
    if missing:
        pytest.skip(f"no {' and no '.join(missing)} on the PATH")


def wait_for_dsn(log: Path) -> str:
    """Return the connection string that `up` tells once all is ready."""
    found: re.Match[str] = wait_for(lambda: re.search(r"psql '([^']+)'", log.read_text()), log)
    return found.group(1)


def wait_for_files(dsn: str, names: set[str]) -> None:
    """Wait until the live files are those with these names."""

    async def live() -> set[str]:
        connection = await asyncpg.connect(dsn)
        try:
            rows = await connection.fetch("SELECT uri FROM files WHERE NOT deleted")
            return {unquote(row["uri"]).rpartition("/")[2] for row in rows}
        finally:
            await connection.close()

    wait_for(lambda: asyncio.run(live()) == names, names)


def wait_for(condition: Callable[[], Any], subject: object) -> Any:
    """Ask again and again until the answer is true, and return it."""
    deadline = time.monotonic() + DEADLINE_SECONDS
    while not (answer := condition()):
        if time.monotonic() > deadline:
            pytest.fail(f"it did not come: {subject.read_text() if isinstance(subject, Path) else subject}")
        time.sleep(0.05)
    return answer


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A small folder: five files, two of them equal, one empty, and a symlink that does not count."""
    root = tmp_path / "tree"
    (root / "below").mkdir(parents=True)
    for name, content in (("a", b"same"), ("below/b", b"same"), ("c d", b"other"), ("é", b"x" * 5000), ("empty", b"")):
        (root / name).write_bytes(content)
    (root / "link").symlink_to("a")
    return root


def test_demo_on_the_embedded_broker(tree: Path) -> None:
    """`demo --once --json` needs nothing that runs, prints one object, and leaves nothing behind."""
    done = stampline(None, "demo", str(tree), "--once", "--json")
    result = json.loads(done.stdout)

    assert done.returncode == 0, done.stderr
    assert {name: result[name] for name in ("files", "bytes", "events", "duplicates", "rejected", "verify")} == {
        "files": 5,
        "bytes": 5013,
        "events": 5,
        "duplicates": 1,
        "rejected": 0,
        "verify": "ok",
    }
    assert result["freshness_ms_p99"] >= result["freshness_ms_p50"] > 0
    assert result["events_per_second"] > 0
    log = next(word for word in done.stderr.split() if word.endswith("broker.log)"))
    assert not Path(log.rstrip(")")).parent.exists()


def test_demo_keeps_its_data_on_apache_kafka(tree: Path, tmp_path: Path, kafka_is_here: None) -> None:
    """With --broker kafka --data the next start goes on: the same files again are unchanged, and all is verified."""
    results: list[dict[str, Any]] = []
    for _ in range(2):
        done = stampline(
            None, "demo", str(tree), "--once", "--json", "--broker", "kafka", "--data", str(tmp_path / "d")
        )
        assert done.returncode == 0, done.stderr
        results.append(json.loads(done.stdout))

    assert [result["files"] for result in results] == [5, 5]
    assert [result["events"] for result in results] == [5, 5]
    assert [result["verify"] for result in results] == ["ok", "ok"]


def test_up_follows_a_folder(tree: Path, tmp_path: Path) -> None:
    """`up PATH` shows files that come, change and go while it runs, and ends with 0 on SIGTERM."""
    log = tmp_path / "up.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "pipeline", "up", str(tree)],
            cwd=_ROOT,
            env=environment(Settings()) | {"LOG_FORMAT": "json"},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
        )
    try:
        dsn = wait_for_dsn(log)
        wait_for_files(dsn, {"a", "b", "c d", "é", "empty"})
        (tree / "new").write_text("new")
        (tree / "a").unlink()
        wait_for_files(dsn, {"b", "c d", "é", "empty", "new"})
        process.send_signal(signal.SIGTERM)

        assert process.wait(DEADLINE_SECONDS) == 0, log.read_text()
    finally:
        process.kill()
        process.wait()


async def test_verify_finds_what_was_tampered_with(road: Road) -> None:
    """`verify` ends with 0 on what stampline wrote, and with 3 and the file's name when somebody changed a row."""
    road.start("hasher", "reducer", "projector")
    positions = await road.send(make_events(300, 40, seed=6))
    await road.until_visible(positions)
    good = stampline(road.settings, "verify", "--json")
    await road.fetch("UPDATE stampline.files SET version = version + 1 WHERE uri = 'file:///made/7.bin' RETURNING 1")
    await road.fetch(
        "DELETE FROM stampline.file_history WHERE input_partition = 2 AND outcome = 'committed' RETURNING 1"
    )
    bad = stampline(road.settings, "verify", "--json")

    assert good.returncode == 0, good.stdout
    assert json.loads(good.stdout)["verify"] == "ok"
    assert bad.returncode == 3
    assert "file:///made/7.bin" in json.loads(bad.stdout)["verify"]
    assert "neither in the history nor dead letters" in json.loads(bad.stdout)["verify"]


async def test_verify_shows_each_outcome_in_its_own_column(road: Road) -> None:
    """Partitions with different outcomes still have the same columns, in the table for people."""
    road.start("hasher", "reducer", "projector")
    positions = await road.send(make_events(100, 40, seed=9))
    await road.send_raw(b"file:///bad", b"no JSON", partition=3)
    await road.until_visible([*positions, Position(3, max(p.offset for p in positions if p.partition == 3) + 1)])
    lines = stampline(road.settings, "verify").stdout.splitlines()

    assert lines[0].split() == ["partition", "inputs", "pending", "committed", "rejected", "files", "verify"]
    assert [line.split()[-1] for line in lines[1:]] == ["ok"] * 4
    assert [line.split()[4] for line in lines[1:]] == ["0", "0", "0", "1"]


async def test_status_shows_how_far_each_partition_has_come(road: Road) -> None:
    """`status` counts up to the end of the road, and says what is away with exit code 3."""
    road.start("hasher", "reducer", "projector")
    positions = await road.send(make_events(200, 40, seed=7))
    await road.until_visible(positions)
    done = stampline(road.settings, "status", "--json")
    away = stampline(road.settings, "status", variables={"POSTGRES_DSN": "postgresql://a@127.0.0.1:1/b"})
    status = json.loads(done.stdout)

    assert done.returncode == 0
    assert sum(partition["visible"] for partition in status["partitions"]) == 200
    assert {partition["behind"] for partition in status["partitions"]} == {0}
    assert away.returncode == 3
    assert "does not answer" in away.stdout


@pytest.mark.parametrize("role", ["hasher", "reducer", "retry", "projector"])
async def test_each_role_is_a_module_of_its_own(road: Road, role: str) -> None:
    """`python -m agents.ROLE` runs the role and drains it on SIGTERM."""
    node = road.launch(f"agents.{role}")
    await road.until(partial(node.has_logged, '"partitions_assigned"'))

    assert node.terminate() == 0
