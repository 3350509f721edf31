"""`pipeline.embedded`: services start, answer, keep what they should, and never outlive their process."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import asyncpg
import psutil
import pytest
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer, TopicPartition
from aiokafka.admin import AIOKafkaAdminClient, NewTopic

from pipeline.embedded import Broker, Services, run_services
from pipeline.errors import ServiceUnavailable, StamplineError

pytestmark = pytest.mark.integration

needs_java = pytest.mark.skipif(
    shutil.which("java") is None or shutil.which("mvn") is None, reason="Apache Kafka needs Java and Maven"
)
each_broker = pytest.mark.parametrize("broker", ["embedded", pytest.param("kafka", marks=needs_java)])

# Runs services until it is killed; prints what it runs as soon as it runs.
_PARENT = """
import json, signal, sys
from pathlib import Path
from pipeline.embedded import run_services

broker, data = sys.argv[1] or None, Path(sys.argv[2]) if sys.argv[2] else None
# A shell that runs the tests in the background has them ignore Ctrl-C, and children inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)
def say(line):
    print("said", line, flush=True)
try:
    with run_services(broker=broker, database=True, data=data, say=say) as services:
        try:
            print(json.dumps({"pids": services.pids, "dsn": services.postgres_dsn}), flush=True)
            while True:
                # Not `pause`: a signal that comes just before it would not be seen.
                signal.sigtimedwait((), 0.1)
        except KeyboardInterrupt:
            services.check()
            print("drained", flush=True)
except KeyboardInterrupt:
    pass
"""


@pytest.fixture
def data() -> Iterator[Path]:
    """A folder that the system user of PostgreSQL may be let into, which pytest's own are not."""
    folder = Path(tempfile.mkdtemp(prefix="stampline-test-"))
    yield folder
    shutil.rmtree(folder)


@pytest.fixture
def start_parent() -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Start a process that runs services; whatever is left of it is ended after the test."""
    started: list[subprocess.Popen[str]] = []

    def start(broker: str = "", data: str = "") -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, "-c", _PARENT, broker, data],
            stdout=subprocess.PIPE,
            text=True,
            cwd=Path(__file__).parents[2],
            start_new_session=True,
        )
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.wait()
        assert process.stdout is not None
        process.stdout.close()


@each_broker
async def test_a_broker_answers_when_it_is_said_to_run(broker: Broker) -> None:
    """A record that is sent as soon as the context is entered can be read; no database is started for it."""
    with run_services(broker=broker, database=False, data=None, say=print) as services:
        assert services.postgres_dsn is None
        await _send(services, b"hello")
        assert await _read_all(services) == [b"hello"]


async def test_the_database_answers_when_it_is_said_to_run() -> None:
    """PostgreSQL 18 runs with the promised database, and no broker is started for it."""
    with run_services(broker=None, database=True, data=None, say=print) as services:
        assert services.kafka_bootstrap_servers is None
        assert await _query(services, "SELECT current_database()") == "metadata_stamping_dev"
        assert str(await _query(services, "SHOW server_version")).startswith("18")
        assert await _query(services, "SHOW fsync") == "on"


@each_broker
def test_a_normal_stop_leaves_nothing(broker: Broker) -> None:
    """When the context ends, all processes have ended and the temporary folder is gone."""
    with run_services(broker=broker, database=True, data=None, say=print) as services:
        pids = services.pids
        folder = _temporary_folder(services.postgres_dsn)
        assert folder.is_dir()
        assert set(pids) == {"broker", "database"}
        guardian = psutil.Process(pids["broker"]).parent()
        assert guardian is not None
    assert not any(_is_running(pid) for pid in [*pids.values(), guardian.pid])
    assert not folder.exists()


@each_broker
def test_a_killed_parent_leaves_nothing(broker: str, start_parent: Callable[..., subprocess.Popen[str]]) -> None:
    """After SIGKILL of the process that runs them, the servers end and the temporary folder is removed."""
    parent = start_parent(broker)
    running = _wait_for_services(parent)
    assert all(_is_running(pid) for pid in running["pids"].values())
    parent.kill()
    _wait_until(lambda: not any(_is_running(pid) for pid in running["pids"].values()))
    _wait_until(lambda: not _temporary_folder(running["dsn"]).exists())


def test_a_parent_killed_during_the_start_leaves_nothing(start_parent: Callable[..., subprocess.Popen[str]]) -> None:
    """SIGKILL before the servers answer ends them too."""
    parent = start_parent("embedded")
    assert parent.stdout is not None
    line = parent.stdout.readline()
    folder = Path(line.rpartition("(log: ")[2].rstrip(")\n")).parent
    (guardian,) = psutil.Process(parent.pid).children()
    parent.kill()
    _wait_until(lambda: not guardian.is_running() and not folder.exists())


def test_ctrl_c_leaves_the_servers_to_the_parent(start_parent: Callable[..., subprocess.Popen[str]]) -> None:
    """SIGINT to the whole process group, as from a terminal, reaches the parent alone: it can drain, then all end."""
    parent = start_parent("embedded")
    running = _wait_for_services(parent)
    os.killpg(parent.pid, signal.SIGINT)
    assert parent.stdout is not None
    assert parent.stdout.readline() == "drained\n"
    assert parent.wait(30) == 0
    assert not any(_is_running(pid) for pid in running["pids"].values())


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a process that its parent is gone")
def test_a_killed_guardian_takes_the_servers_along(start_parent: Callable[..., subprocess.Popen[str]]) -> None:
    """Nothing is left running even where the guardian itself gets SIGKILL."""
    parent = start_parent("embedded")
    running = _wait_for_services(parent)
    (guardian,) = psutil.Process(parent.pid).children()
    guardian.kill()
    _wait_until(lambda: not any(_is_running(pid) for pid in running["pids"].values()))
    # What the guardian would have done.
    shutil.rmtree(_temporary_folder(running["dsn"]))


@needs_java
async def test_a_data_folder_keeps_records_and_rows(data: Path) -> None:
    """With a data folder the next start, on other ports, finds what the last one was told."""
    with run_services(broker="kafka", database=True, data=data, say=print) as services:
        await _send(services, b"kept")
        await _query(services, "CREATE TABLE kept AS SELECT 7 AS number")
    with run_services(broker="kafka", database=True, data=data, say=print) as services:
        assert await _read_all(services) == [b"kept"]
        assert await _query(services, "SELECT number FROM kept") == 7


async def test_a_data_folder_can_be_used_right_after_a_kill(
    data: Path, start_parent: Callable[..., subprocess.Popen[str]]
) -> None:
    """A start waits for the guardian of a killed process to let the folder go."""
    parent = start_parent("", str(data))
    _wait_for_services(parent)
    parent.kill()
    with run_services(broker=None, database=True, data=data, say=print) as services:
        assert await _query(services, "SELECT 1") == 1


def test_the_embedded_broker_refuses_a_data_folder(data: Path) -> None:
    """It could not keep its promise, so it says what can."""
    with (
        pytest.raises(StamplineError, match="use --broker kafka"),
        run_services(broker="embedded", database=False, data=data, say=print),
    ):
        pass


@needs_java
async def test_a_killed_broker_is_told_and_can_be_started_again() -> None:
    """`check` names the server that has ended; `start` brings it back at its address with its records."""
    with run_services(broker="kafka", database=False, data=None, say=print) as services:
        await _send(services, b"before")
        services.check()
        os.kill(services.pids["broker"], signal.SIGKILL)
        _wait_until(lambda: not _is_running(services.pids["broker"]))
        services.start("broker")
        services.check()
        await _send(services, b"after")
        assert await _read_all(services) == [b"before", b"after"]


def test_a_dead_server_is_reported_with_its_log() -> None:
    """The line says which server has ended and how, and its log outlives the temporary folder."""
    with run_services(broker="embedded", database=False, data=None, say=print) as services:
        process = psutil.Process(services.pids["broker"])
        process.kill()
        _wait_until(lambda: not process.is_running())
        with pytest.raises(ServiceUnavailable, match=r"Tansu\) does not run any more \(ended by SIGKILL\)") as caught:
            services.check()
    log = Path(str(caught.value).rpartition("log: ")[2])
    assert log.is_file()
    shutil.rmtree(log.parent)


def test_a_paused_server_ends_cleanly() -> None:
    """A server that a test has paused with SIGSTOP does not hold up the end."""
    with run_services(broker=None, database=True, data=None, say=print) as services:
        pid = services.pids["database"]
        os.kill(pid, signal.SIGSTOP)
        started = time.monotonic()
    assert time.monotonic() - started < 10
    assert not _is_running(pid)


def test_a_missing_java_is_one_clear_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Without Java the error says what is missing, how to get it and what else would do."""
    monkeypatch.setenv("PATH", str(tmp_path))
    with (
        pytest.raises(ServiceUnavailable) as caught,
        run_services(broker="kafka", database=False, data=None, say=print),
    ):
        pass
    message = str(caught.value)
    assert "\n" not in message
    assert "needs Java 17 or newer" in message
    assert "apt install" in message
    assert "embedded broker" in message


def test_a_failed_start_names_its_log(data: Path) -> None:
    """A database that does not come up is one line with the path of its log, in the data folder."""
    (data / "postgres").mkdir()
    with (
        pytest.raises(ServiceUnavailable, match=r"PostgreSQL 18 did not start \(ended with status \d\)") as caught,
        run_services(broker=None, database=True, data=data, say=print),
    ):
        pass
    assert str(caught.value).endswith(f"; its log: {data}/postgres.log")
    assert (data / "postgres.log").read_text()


@needs_java
def test_a_failed_start_keeps_nothing_but_its_log(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Without a data folder the log is all that is left of the temporary one."""
    java = tmp_path / "java"
    java.write_text("#!/bin/sh\necho this Java is broken\nexit 3\n")
    java.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    with (
        pytest.raises(ServiceUnavailable, match=r"Apache Kafka .* \(`java`: 3\)") as caught,
        run_services(broker="kafka", database=True, data=None, say=print),
    ):
        pass
    log = Path(str(caught.value).rpartition("log: ")[2])
    assert log.read_text() == "this Java is broken\n"
    assert list(log.parent.iterdir()) == [log]
    shutil.rmtree(log.parent)


def test_services_from_elsewhere_cannot_be_stopped() -> None:
    """Addresses alone are services too; only those who started a server may stop it."""
    with pytest.raises(StamplineError, match="not started here"):
        Services("localhost:9092", None).stop("broker")


async def _send(services: Services, value: bytes) -> None:
    assert services.kafka_bootstrap_servers is not None
    admin = AIOKafkaAdminClient(bootstrap_servers=services.kafka_bootstrap_servers)
    await admin.start()
    try:
        if "greetings" not in await admin.list_topics():
            await admin.create_topics([NewTopic("greetings", 1, 1)])
    finally:
        await admin.close()
    # Tansu does not know aiokafka's InitProducerId, which idempotence asks for.
    producer = AIOKafkaProducer(bootstrap_servers=services.kafka_bootstrap_servers, enable_idempotence=False)
    await producer.start()
    try:
        await producer.send_and_wait("greetings", value, partition=0)
    finally:
        await producer.stop()


async def _read_all(services: Services) -> list[bytes]:
    consumer = AIOKafkaConsumer(bootstrap_servers=services.kafka_bootstrap_servers, enable_auto_commit=False)
    await consumer.start()
    try:
        partition = TopicPartition("greetings", 0)
        consumer.assign([partition])
        await consumer.seek_to_beginning(partition)
        values = [(await consumer.getone()).value]
        while await consumer.position(partition) < consumer.highwater(partition):
            values.append((await consumer.getone()).value)
        return values
    finally:
        await consumer.stop()


async def _query(services: Services, statement: str) -> object:
    connection = await asyncpg.connect(services.postgres_dsn)
    try:
        return await connection.fetchval(statement)
    finally:
        await connection.close()


def _wait_for_services(parent: subprocess.Popen[str]) -> dict[str, Any]:
    assert parent.stdout is not None
    for line in parent.stdout:
        if line.startswith("{"):
            running: dict[str, Any] = json.loads(line)
            return running
    raise AssertionError("the services did not start")


def _temporary_folder(dsn: str | None) -> Path:
    assert dsn is not None
    return Path(dsn.partition("host=")[2].partition("&")[0]).parent


def _is_running(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _wait_until(condition: Callable[[], bool], *, seconds_max: float = 40) -> None:
    deadline = time.monotonic() + seconds_max
    while not condition():
        assert time.monotonic() < deadline, "the condition did not become true in time"
        time.sleep(0.02)
