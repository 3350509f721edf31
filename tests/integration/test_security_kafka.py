"""Kafka over TLS and with logins, against a real Apache Kafka: every way in works, and every mistake is one line.

A mistake is tried with the command line, as a person would meet it; the clients of a running node are tried in process.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from faust.types import TP

from pipeline.client import EventProducer
from pipeline.errors import SettingsError, StamplineError
from pipeline.logreader import LogReader
from pipeline.records import Record
from pipeline.settings import Settings
from pipeline.topics import FILE_EVENTS, FILE_STAMPS, check_topics, create_topics, has_transactions, topic_name
from pipeline.transactions import Writer
from tests.fix_road import DEADLINE_SECONDS, Road, ending, environment, make_events
from tests.fix_secure import PASSWORD, Certificates, Listener, SecureKafka, SecurePostgres

pytestmark = [
    pytest.mark.integration,
    pytest.mark.skipif(
        shutil.which("java") is None or shutil.which("mvn") is None, reason="Apache Kafka needs Java and Maven"
    ),
]

MakeSettings = Callable[..., Settings]

_ROOT = Path(__file__).parents[2]
_WRONG = "a-wr0ng-passw0rd"


def stampline(settings: Settings, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run a command to its end."""
    return subprocess.run(
        [sys.executable, "-m", "pipeline", *arguments],
        cwd=_ROOT,
        env=environment(settings),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=DEADLINE_SECONDS,
        check=False,
    )


async def never_commits(_offsets: object) -> None:
    """Nothing here commits outside a transaction."""
    raise AssertionError


def make_writer(settings: Settings) -> Writer:
    """Make the writer of a transaction."""
    return Writer(
        settings,
        partition=0,
        group=topic_name(settings, "g"),
        transactional_id=topic_name(settings, "t"),
        idempotent=True,
        commit_offsets=never_commits,
    )


@pytest.mark.parametrize(
    ("listener", "mechanism"),
    [
        ("TLS", ""),
        ("MUTUAL", ""),
        ("SASL_TLS", "PLAIN"),
        ("SASL_TLS", "SCRAM-SHA-256"),
        ("SASL_TLS", "SCRAM-SHA-512"),
        ("SASL_CLEAR", "PLAIN"),
        ("SASL_CLEAR", "SCRAM-SHA-256"),
    ],
)
async def test_every_client_comes_in_every_way(
    secure_kafka: SecureKafka, make_secure_settings: MakeSettings, listener: Listener, mechanism: str
) -> None:
    """Topics are made and checked, events are sent, a transaction commits, and both are read, over each wire."""
    settings = make_secure_settings(**secure_kafka.settings_for(listener, mechanism))
    await create_topics(settings)
    async with EventProducer(settings) as producer:
        positions = await producer.send_all(make_events(20, 10, seed=1))
    events, stamps = topic_name(settings, FILE_EVENTS), topic_name(settings, FILE_STAMPS)
    writer = make_writer(settings)
    try:
        await writer.open()
        await writer.write({stamps: [Record(b"k", b"v", ())]}, {TP(events, 0): 1})
    finally:
        await writer.aclose()
    counts = {}
    for topic in (events, stamps):
        async with LogReader(settings, topic, 0) as reader:
            counts[topic] = sum([len(records) async for records in reader.read(0)])

    assert [check.fault for check in await check_topics(settings)] == [None] * 5
    assert counts == {events: sum(position.partition == 0 for position in positions), stamps: 1}


@pytest.mark.parametrize(
    ("listener", "wrong", "texts"),
    [
        ("TLS", {"kafka_ssl_ca": "strange"}, ("is not trusted (", "set KAFKA_SSL_CA to the CA that signed it")),
        ("TLS", {"kafka_ssl_ca": None}, ("is not trusted (", "set KAFKA_SSL_CA to the CA that signed it")),
        ("ELSEWHERE", {}, ("is for another name (", "not valid for '127.0.0.1'", "KAFKA_BOOTSTRAP_SERVERS")),
        ("RENAMED", {}, ("is for another name (", "not valid for 'localhost'", "advertised listeners")),
        ("EXPIRED", {}, ("is not valid today (certificate has expired)", "renew it", "KAFKA_SSL_CA")),
        (
            "MUTUAL",
            {"kafka_ssl_cert": None, "kafka_ssl_key": None},
            ("wants a client certificate", "set KAFKA_SSL_CERT and KAFKA_SSL_KEY"),
        ),
        ("MUTUAL", {"kafka_ssl_cert": "strange", "kafka_ssl_key": "strange"}, ("does not accept", "KAFKA_SSL_CERT")),
        ("TLS", {"kafka_security_protocol": "PLAINTEXT"}, ("hangs up", "KAFKA_SECURITY_PROTOCOL=PLAINTEXT")),
        ("SASL_TLS", {"kafka_security_protocol": "PLAINTEXT"}, ("hangs up", "KAFKA_SECURITY_PROTOCOL=PLAINTEXT")),
        ("SASL_TLS", {"kafka_security_protocol": "SSL"}, ("hangs up", "KAFKA_SECURITY_PROTOCOL=SSL")),
        (
            "SASL_TLS",
            {"kafka_security_protocol": "SASL_PLAINTEXT"},
            ("hangs up", "KAFKA_SECURITY_PROTOCOL=SASL_PLAINTEXT"),
        ),
        ("SASL_CLEAR", {"kafka_security_protocol": "PLAINTEXT"}, ("hangs up", "KAFKA_SECURITY_PROTOCOL=PLAINTEXT")),
        ("SASL_CLEAR", {"kafka_security_protocol": "SSL"}, ("hangs up", "KAFKA_SECURITY_PROTOCOL=SSL")),
        ("SASL_CLEAR", {"kafka_security_protocol": "SASL_SSL"}, ("hangs up", "KAFKA_SECURITY_PROTOCOL=SASL_SSL")),
        ("SASL_CLEAR", {}, ("KAFKA_SASL_MECHANISM=SCRAM-SHA-512",)),
        (
            "TLS",
            {"kafka_security_protocol": "SASL_SSL", "kafka_sasl_username": "alice", "kafka_sasl_password": _WRONG},
            ("has no login", "KAFKA_SECURITY_PROTOCOL=SASL_SSL", "set SSL"),
        ),
        *(
            (
                "SASL_TLS",
                {"kafka_sasl_mechanism": mechanism, "kafka_sasl_password": _WRONG},
                ("does not let user alice in (", "KAFKA_SASL_USERNAME and KAFKA_SASL_PASSWORD"),
            )
            for mechanism in ("PLAIN", "SCRAM-SHA-256", "SCRAM-SHA-512")
        ),
        ("SASL_TLS", {"kafka_sasl_username": "mallory"}, ("does not let user mallory in (", "KAFKA_SASL_USERNAME")),
    ],
)
async def test_a_mistake_is_one_line(
    secure_kafka: SecureKafka,
    make_secure_settings: MakeSettings,
    *,
    listener: Listener,
    wrong: dict[str, Any],
    texts: tuple[str, ...],
) -> None:
    """Whatever does not fit, one line says what is wrong and which variable to look at, and never the password."""
    certificates = secure_kafka.certificates
    strange = {
        "kafka_ssl_ca": certificates.strange_ca,
        "kafka_ssl_cert": certificates.strange.chain,
        "kafka_ssl_key": certificates.strange.key,
    }
    wrong = {name: strange[name] if value == "strange" else value for name, value in wrong.items()}
    settings = make_secure_settings(**(secure_kafka.settings_for(listener) | wrong))
    done = stampline(settings, "topics", "check")

    assert done.returncode == 1, done.stderr
    assert done.stdout == ""
    [line] = done.stderr.splitlines()
    assert line.startswith("stampline: ")
    assert f"Kafka at {secure_kafka.address_of(listener)} " in line
    for text in texts:
        assert text in line
    assert PASSWORD not in line
    assert _WRONG not in line


@pytest.mark.parametrize(
    "arguments", [("worker", "hasher", "reducer"), ("topics", "create"), ("scan", "."), ("verify",), ("status",)]
)
async def test_every_command_tells_it(
    secure_kafka: SecureKafka, make_secure_settings: MakeSettings, arguments: tuple[str, ...]
) -> None:
    """Each command that needs Kafka tells a wrong password, with nothing else around it."""
    wrong = {"kafka_sasl_password": _WRONG, "allowed_roots": (_ROOT,)}
    done = stampline(make_secure_settings(**(secure_kafka.settings_for("SASL_TLS") | wrong)), *arguments)
    told = [line for line in (done.stdout + done.stderr).splitlines() if "does not let user alice in" in line]

    assert done.returncode == (3 if arguments == ("status",) else 1), done.stderr
    assert len(told) == 1
    assert "Traceback" not in done.stderr
    assert _WRONG not in done.stdout + done.stderr


async def test_every_client_tells_it(secure_kafka: SecureKafka, make_secure_settings: MakeSettings) -> None:
    """The writers and readers of a running node raise the line, where a password was changed under them."""
    settings = make_secure_settings(**secure_kafka.settings_for("SASL_TLS") | {"kafka_sasl_password": _WRONG})
    writer, reader = make_writer(settings), LogReader(settings, FILE_EVENTS, 0)

    for refused in (writer.open(), reader.__aenter__(), EventProducer(settings).__aenter__()):
        with pytest.raises(SettingsError, match=r"does not let user alice in .*KAFKA_SASL_PASSWORD$"):
            await refused


async def test_a_refusal_is_told_before_a_broker_that_is_away(
    secure_kafka: SecureKafka, make_secure_settings: MakeSettings
) -> None:
    """With several brokers, of which one is away, the wrong password is what has to be mended first."""
    right = secure_kafka.settings_for("SASL_TLS")
    several = {"kafka_bootstrap_servers": f"127.0.0.1:1,{right['kafka_bootstrap_servers']},127.0.0.1:2"}

    assert await has_transactions(make_secure_settings(**right | several))
    with pytest.raises(SettingsError, match="does not let user alice in"):
        await has_transactions(make_secure_settings(**right | several | {"kafka_sasl_password": _WRONG}))


async def test_the_ca_may_be_one_of_the_system(
    secure_kafka: SecureKafka,
    certificates: Certificates,
    make_secure_settings: MakeSettings,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Without KAFKA_SSL_CA the CAs of the system count; here OpenSSL is told another place for them."""
    settings = make_secure_settings(**secure_kafka.settings_for("TLS") | {"kafka_ssl_ca": None})
    monkeypatch.setenv("SSL_CERT_FILE", str(certificates.ca))

    assert await has_transactions(settings)


async def test_a_password_file_that_is_wrong_is_named(
    secure_kafka: SecureKafka, make_secure_settings: MakeSettings, tmp_path: Path
) -> None:
    """The variable that is told is the one that was set; a file of other bytes is not shown."""
    file = tmp_path / "password"
    file.write_text(_WRONG)
    by_file = {"kafka_sasl_password": None, "kafka_sasl_password_file": file}
    settings = make_secure_settings(**secure_kafka.settings_for("SASL_TLS") | by_file)
    with pytest.raises(StamplineError, match=r"KAFKA_SASL_PASSWORD_FILE$"):
        await has_transactions(settings)
    file.write_bytes(b"\xff\xfe" + _WRONG.encode())
    with pytest.raises(SettingsError, match=r"KAFKA_SASL_PASSWORD_FILE: .*password is no text") as caught:
        await has_transactions(settings)

    assert _WRONG not in str(caught.value)


async def test_a_password_changed_under_a_running_node(
    secure_kafka: SecureKafka, make_secure_settings: MakeSettings, tmp_path: Path
) -> None:
    """A broker that comes back with another password for a node is told, and the node goes on once it fits again."""
    settings = make_secure_settings(**secure_kafka.settings_for("SASL_TLS") | {"kafka_sasl_username": "node"})
    with ending(Road(settings, tmp_path)) as road:
        secure_kafka.set_password("node", PASSWORD)
        await road.until(partial(_comes_in, settings))
        await create_topics(settings)
        node = road.start("hasher")
        await road.until(partial(node.has_logged, '"partitions_assigned"'))
        secure_kafka.set_password("node", _WRONG)
        await secure_kafka.stop()
        await secure_kafka.start()
        await road.until(partial(node.has_logged, "invalid credentials with SASL mechanism SCRAM-SHA-512"))
        secure_kafka.set_password("node", PASSWORD)
        await road.until(partial(_comes_in, settings))
        positions = await road.send(make_events(100, 10, seed=8))
        await road.until(partial(_holds_stamps, settings, len(positions)))
        assert node.terminate() == 0
        log = node.log.read_text()

    assert "Traceback" not in log
    assert PASSWORD not in log


async def _comes_in(settings: Settings) -> bool:
    """Whether the broker has heard of the password: it answers before it knows it itself."""
    try:
        return await has_transactions(settings)
    except SettingsError:
        return False


async def _holds_stamps(settings: Settings, count: int) -> bool:
    """Whether there is one stamp for each event."""
    stamps = 0
    for partition in range(settings.kafka_topic_partitions):
        async with LogReader(settings, topic_name(settings, FILE_STAMPS), partition) as reader:
            stamps += sum([len(records) async for records in reader.read(0)])
    return stamps == count


async def test_the_whole_road_over_secure_wires(
    secure_kafka: SecureKafka,
    secure_postgres: SecurePostgres,
    certificates: Certificates,
    make_secure_settings: MakeSettings,
    tmp_path: Path,
) -> None:
    """With TLS and SCRAM to both servers, passwords in files, all commands work and what comes out is exact."""
    password = tmp_path / "password"
    password.write_text(PASSWORD + "\n")
    by_file = {"kafka_sasl_password": None, "kafka_sasl_password_file": password}
    by_file |= {"postgres_password": None, "postgres_password_file": password}
    ways = secure_kafka.settings_for("SASL_TLS") | secure_postgres.settings_for(certificates.ca)
    ours = {"kafka_transactions": "on", "postgres_db": await secure_postgres.make_database()}
    settings = make_secure_settings(**ways | by_file | ours)
    for arguments in (("topics", "create"), ("topics", "check"), ("migrate", "upgrade")):
        done = stampline(settings, *arguments)
        assert done.returncode == 0, done.stderr
    events = make_events(2000, 100, seed=5)
    with ending(Road(settings, tmp_path)) as road:
        node = road.start("hasher", "reducer", "projector")
        positions = await road.send(events)
        await road.until_visible(positions)
        await road.assert_exact(events, positions)
        status, verified = stampline(settings, "status"), stampline(settings, "verify")
        assert node.terminate() == 0
        log = node.log.read_text()

    assert status.returncode == 0, status.stdout
    assert verified.returncode == 0, verified.stdout
    assert "Traceback" not in log
    assert PASSWORD not in log + status.stdout + verified.stdout
