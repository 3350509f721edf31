"""`pipeline.kafka`: options from settings, the partition of a key, and errors in our words."""

from __future__ import annotations

import ssl
import subprocess
from collections.abc import Awaitable, Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import aiokafka.client
import pytest
from aiokafka import errors as driver
from aiokafka.partitioner import DefaultPartitioner
from aiokafka.partitioner import murmur2 as murmur2_of_driver
from hypothesis import given
from hypothesis import strategies as st

from pipeline.errors import InputRejected, ServiceUnavailable, SettingsError, StamplineError, TopicError
from pipeline.kafka import kafka_errors, kafka_options, missing_topic, murmur2, partition_for, translated
from pipeline.settings import Settings

pytestmark = pytest.mark.unit


@given(st.binary(max_size=300))
def test_murmur2_is_that_of_the_driver(data: bytes) -> None:
    """The fast version gives the same number for any bytes."""
    assert murmur2(data) == murmur2_of_driver(data)


@pytest.mark.parametrize(
    ("key", "expected"), [(b"21", -973932308), (b"foobar", -790332482), (b"a-little-bit-long-string", -985981536)]
)
def test_murmur2_is_that_of_java(key: bytes, expected: int) -> None:
    """The samples of Apache Kafka's own UtilsTest."""
    assert murmur2(key) == expected & 0xFFFFFFFF


@given(st.binary(max_size=100), st.integers(1, 1000))
def test_a_key_has_the_partition_that_any_client_chooses(key: bytes, partitions: int) -> None:
    """Our producers and everybody else's agree, or the order of a file's events would be lost."""
    every = list(range(partitions))
    assert partition_for(key, partitions) == DefaultPartitioner()(key, every, every)


def test_plain_options_carry_no_secret() -> None:
    """Without TLS and login there is an address, a bound and the protocol."""
    settings = Settings(kafka_bootstrap_servers="k:1", kafka_request_timeout_ms=3000)
    assert kafka_options(settings) == {
        "bootstrap_servers": "k:1",
        "request_timeout_ms": 3000,
        "security_protocol": "PLAINTEXT",
    }


def test_sasl_options(tmp_path: Path) -> None:
    """Mechanism, name and the password from its file; TLS verifies the broker."""
    (tmp_path / "password").write_text("s3cret\n")
    options = kafka_options(
        Settings(
            kafka_security_protocol="SASL_SSL",
            kafka_sasl_mechanism="SCRAM-SHA-512",
            kafka_sasl_username="ann",
            kafka_sasl_password_file=tmp_path / "password",
        )
    )
    context = options.pop("ssl_context")
    assert isinstance(context, ssl.SSLContext)
    assert context.verify_mode is ssl.CERT_REQUIRED
    assert context.check_hostname
    assert options["sasl_mechanism"] == "SCRAM-SHA-512"
    assert (options["sasl_plain_username"], options["sasl_plain_password"]) == ("ann", "s3cret")


def test_a_client_certificate_is_loaded(tmp_path: Path) -> None:
    """Certificate and key of their own, trusted by a CA of one's own."""
    certificate, key = _certificate(tmp_path)
    settings = Settings(
        kafka_security_protocol="SSL", kafka_ssl_ca=certificate, kafka_ssl_cert=certificate, kafka_ssl_key=key
    )
    context = kafka_options(settings)["ssl_context"]
    assert len(context.get_ca_certs()) == 1


@pytest.mark.parametrize("variable", ["kafka_ssl_ca", "kafka_ssl_cert"])
def test_a_bad_certificate_names_its_variable(tmp_path: Path, variable: str) -> None:
    """A file that is no certificate stops the start, with the name of the variable."""
    (tmp_path / "bad").write_text("no certificate")
    values: dict[str, Any] = {variable: tmp_path / "bad"}
    with pytest.raises(SettingsError, match=variable.upper()):
        kafka_options(Settings(kafka_security_protocol="SSL", **values))


@pytest.mark.parametrize(
    ("error", "expected", "words"),
    [
        (driver.KafkaConnectionError("x"), ServiceUnavailable, "Kafka at k:1 does not answer.*KAFKA_BOOTSTRAP_SERVERS"),
        (TimeoutError(), ServiceUnavailable, "Kafka at k:1 does not answer: no reply in time"),
        (driver.KafkaTimeoutError(), ServiceUnavailable, "Kafka at k:1 does not answer"),
        (driver.NodeNotReadyError("node 1"), ServiceUnavailable, "does not answer: NodeNotReadyError: node 1"),
        (ConnectionResetError(104, "reset"), ServiceUnavailable, "does not answer: ConnectionResetError"),
        (driver.UnknownTopicOrPartitionError(), TopicError, "no topic t: run `stampline topics create`"),
        (driver.TopicAuthorizationFailedError("t"), TopicError, "does not allow this.*ACL"),
        (driver.AuthenticationFailedError("bad"), SettingsError, "does not let user ann in .bad.: check KAFKA_SASL_"),
        (driver.AuthenticationFailedError(), SettingsError, "in .AuthenticationFailedError.: check KAFKA_SASL_"),
        (driver.MessageSizeTooLargeError(), InputRejected, "too_large"),
        (
            driver.KafkaConnectionError("Unable to bootstrap from x"),
            ServiceUnavailable,
            "hangs up.*=PLAINTEXT",
        ),
        (ssl.SSLError(1, "WRONG_VERSION_NUMBER"), SettingsError, "does not speak TLS with us, as KAFKA_SECURITY"),
    ],
)
def test_errors_of_the_driver_become_ours(error: Exception, expected: type[StamplineError], words: str) -> None:
    """Every error says which Kafka, what is wrong and what to do; the driver's own is kept as its cause."""
    settings = Settings(kafka_bootstrap_servers="k:1", kafka_sasl_username="ann")
    with pytest.raises(expected, match=words) as caught, kafka_errors(settings, topic="t"):
        raise error
    assert caught.value.__cause__ is error
    assert type(translated(error, settings, topic="t")) is expected


@pytest.fixture
def connect(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Awaitable[Any]]:
    """The driver's way to connect, which does here what is asked of it by the name of the host."""

    async def connect(host: str, _port: int, **_options: Any) -> str:
        fault = _FAULTS.get(host)
        if fault is not None:
            raise fault
        return "a connection"

    monkeypatch.setattr("pipeline.kafka._connect", connect)
    way: Callable[..., Awaitable[Any]] = aiokafka.client.create_conn
    return way


_FAULTS: dict[str, Exception] = {
    "away": ConnectionRefusedError(111, "refused"),
    "refusing": driver.SaslAuthenticationFailed("bad login"),
    "impostor": ValueError("Server sent wrong signature!"),
    "no_such_host": UnicodeError("label too long"),
}


@pytest.mark.parametrize(
    ("hosts", "words"),
    [
        (("away",), "does not answer: start it"),
        (("refusing",), "does not let user ann in .bad login."),
        (("refusing", "away"), "does not let user ann in .bad login."),
        (("impostor",), "does not prove that it knows the password"),
    ],
)
async def test_why_a_connection_failed_is_told(
    connect: Callable[..., Awaitable[Any]], hosts: tuple[str, ...], words: str
) -> None:
    """The driver only says that it got nowhere; what was met on the way is told, and what can be mended first."""
    settings = Settings(kafka_sasl_username="ann")
    with pytest.raises(StamplineError, match=words):
        await _try_in_vain(settings, connect, *hosts)


async def test_what_has_been_overcome_is_not_told(
    connect: Callable[..., Awaitable[Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A refusal counts until the same broker lets us in, and only inside its own block."""
    settings = Settings(kafka_sasl_username="ann")
    with suppress(StamplineError):
        await _try_in_vain(settings, connect, "refusing")
    with pytest.raises(ServiceUnavailable, match="start it"):
        await _try_in_vain(settings, connect, "away")

    async def relent(host: str, port: int) -> None:
        with suppress(driver.KafkaError):
            await connect(host, port)
        monkeypatch.delitem(_FAULTS, host)
        await connect(host, port)

    with pytest.raises(ServiceUnavailable, match="start it"):
        await _try_in_vain(settings, relent, "refusing")


async def _try_in_vain(settings: Settings, connect: Callable[..., Awaitable[Any]], *hosts: str) -> None:
    """Do what the driver does: try each host, and then tell nothing of why."""
    with kafka_errors(settings):
        for host in hosts:
            with suppress(driver.KafkaError, OSError):
                await connect(host, 1)
        raise driver.KafkaConnectionError


async def test_our_own_mistakes_are_no_refusals(connect: Callable[..., Awaitable[Any]]) -> None:
    """A host name that cannot be one is not taken for a broker that cannot prove who it is."""
    with pytest.raises(UnicodeError):
        await connect("no_such_host", 1)


def test_other_errors_pass() -> None:
    """Our own errors and our own bugs are not dressed up as Kafka's."""
    settings = Settings()
    with pytest.raises(TopicError, match="run `stampline topics create`"), kafka_errors(settings):
        raise missing_topic(settings, "t")
    with pytest.raises(ZeroDivisionError), kafka_errors(settings):
        raise ZeroDivisionError


def _certificate(folder: Path) -> tuple[Path, Path]:
    certificate, key = folder / "cert.pem", folder / "key.pem"
    command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes"]
    names = ["-subj", "/CN=test", "-days", "1", "-out", str(certificate), "-keyout", str(key)]
    subprocess.run(command + names, check=True, capture_output=True)
    return certificate, key
