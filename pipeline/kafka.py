"""How to reach Kafka: the options that every client shares, the partition of a key, and the driver's errors in ours.

aiokafka keeps to itself why a connection failed: whoever asked hears "unable to bootstrap" or "node not ready", be it a
wrong password, a bad certificate or a broker that is away. So each attempt to connect is noted here, and `kafka_errors`
tells what became of those inside its block.

Imports the settings, the errors and aiokafka; opens nothing by itself.
"""

from __future__ import annotations

import asyncio
import ssl
import struct
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from typing import Any, Final

import aiokafka.client
from aiokafka import AIOKafkaProducer
from aiokafka import errors as driver

from pipeline import recordbatches
from pipeline.errors import InputRejected, ServiceUnavailable, SettingsError, StamplineError, TopicError
from pipeline.settings import Settings

# Here, because nobody makes a consumer without the options from here.
recordbatches.install()

#: Longest that letting go of a producer takes, in s.
_ABANDON_SECONDS: Final = 1.0

_WORD: Final = 0xFFFFFFFF
_MIX: Final = 0x5BD1E995

#: What the driver raises where a login or a certificate is not accepted; waiting does not help.
_REFUSED: Final = (
    driver.AuthenticationFailedError,
    driver.AuthenticationMethodNotSupported,
    driver.SaslAuthenticationFailed,
    driver.UnsupportedSaslMechanismError,
    driver.IllegalSaslStateError,
)
#: What the driver raises where a connection could not be had, whatever the reason.
_UNREACHED: Final = (driver.KafkaConnectionError, driver.NodeNotReadyError, driver.KafkaTimeoutError, TimeoutError)
#: OpenSSL's numbers for a certificate of another host or address, and for one before or after its time.
_OTHER_NAME: Final = {62, 64}
_OTHER_TIME: Final = {9, 10}
_FORBIDDEN: Final = (
    driver.TopicAuthorizationFailedError,
    driver.GroupAuthorizationFailedError,
    driver.ClusterAuthorizationFailedError,
    driver.TransactionalIdAuthorizationFailed,
)


class FencedInstanceId(driver.BrokerResponseError):  # type: ignore[misc] # aiokafka has no types
    """Another process has joined a group under this one's `group.instance.id`; aiokafka does not know the error."""

    errno = 82
    message = "FENCED_INSTANCE_ID"
    description = "another process has joined under the same group.instance.id"


driver.kafka_errors[FencedInstanceId.errno] = FencedInstanceId


async def abandon(producer: AIOKafkaProducer, reason: str) -> None:
    """Stop a producer that cannot deliver what it holds.

    An idempotent driver never gives up by itself, and has no public way to stop without a flush: take its connections
    away, end its sender, and let go of those who wait for a delivery.
    """
    await producer.client.close()
    # It waits for the requests under way, which end with their connections.
    with suppress(TimeoutError):
        async with asyncio.timeout(_ABANDON_SECONDS):
            await producer._sender.close()  # noqa: SLF001
    producer._message_accumulator.fail_all(ServiceUnavailable(reason))  # noqa: SLF001


def kafka_options(settings: Settings) -> dict[str, Any]:
    """Return the arguments that aiokafka's producers, consumers and admin clients have in common.

    Raises:
        SettingsError: a certificate or the password's file cannot be read; names the variable.
    """
    protocol = settings.kafka_security_protocol
    options: dict[str, Any] = {
        "bootstrap_servers": settings.kafka_bootstrap_servers,
        "request_timeout_ms": settings.kafka_request_timeout_ms,
        "security_protocol": protocol,
    }
    if protocol in {"SSL", "SASL_SSL"}:
        options["ssl_context"] = ssl_context(settings)
    if protocol.startswith("SASL"):
        options["sasl_mechanism"] = settings.kafka_sasl_mechanism
        options["sasl_plain_username"] = settings.kafka_sasl_username
        try:
            options["sasl_plain_password"] = settings.kafka_sasl_secret
        except (OSError, UnicodeDecodeError):
            # Without the cause: it can hold what is in the file.
            path = settings.kafka_sasl_password_file
            raise SettingsError(f"KAFKA_SASL_PASSWORD_FILE: {path} is no text that can be read") from None
    return options


def ssl_context(settings: Settings) -> ssl.SSLContext:
    """Return a TLS context that verifies the brokers, with our certificate where there is one.

    Raises:
        SettingsError: a certificate cannot be loaded; names the variable.
    """
    try:
        context = ssl.create_default_context(cafile=settings.kafka_ssl_ca)
    except OSError as exc:
        raise SettingsError(f"KAFKA_SSL_CA: {settings.kafka_ssl_ca} is no CA certificate: {exc}") from exc
    if settings.kafka_ssl_cert is not None:
        try:
            # A key with a passphrase would make OpenSSL ask on the terminal: answer it with an empty one.
            context.load_cert_chain(settings.kafka_ssl_cert, settings.kafka_ssl_key, password="")
        except OSError as exc:
            raise SettingsError(
                f"KAFKA_SSL_CERT, KAFKA_SSL_KEY: {settings.kafka_ssl_cert} and its private key cannot be used: {exc}"
            ) from exc
    return context


def partition_for(key: bytes, partitions: int) -> int:
    """Return the partition of `key` among `partitions`: murmur2, as Java clients choose it."""
    return (murmur2(key) & 0x7FFFFFFF) % partitions


def murmur2(data: bytes) -> int:
    """Return Kafka's murmur2 of `data`: the same number as `aiokafka.partitioner.murmur2` in half the time."""
    value = 0x9747B28C ^ len(data)
    words = len(data) >> 2
    for word in struct.unpack_from(f"<{words}I", data):
        mixed = (word * _MIX) & _WORD
        value = ((value * _MIX) & _WORD) ^ (((mixed ^ (mixed >> 24)) * _MIX) & _WORD)
    if tail := data[words << 2 :]:
        value = ((value ^ int.from_bytes(tail, "little")) * _MIX) & _WORD
    value = ((value ^ (value >> 13)) * _MIX) & _WORD
    return value ^ (value >> 15)


class _Attempts:
    """What became of the attempts to connect inside one `kafka_errors`, by host and port."""

    def __init__(self) -> None:
        self._faults: dict[tuple[str, int], Exception] = {}

    def note(self, place: tuple[str, int], fault: Exception | None) -> None:
        """Note the newest attempt at one place; None = it succeeded."""
        self._faults.pop(place, None)
        if fault is not None:
            self._faults[place] = fault

    @property
    def fault(self) -> Exception | None:
        """The fault that says most: a refusal before a broker that is away, else the newest."""
        newest_first = list(reversed(self._faults.values()))
        refusals = [fault for fault in newest_first if isinstance(fault, (*_REFUSED, ssl.SSLError))]
        return next(iter(refusals + newest_first), None)


_attempts: ContextVar[_Attempts | None] = ContextVar("attempts", default=None)
_connect: Final = aiokafka.client.create_conn


async def _connect_and_note(host: str, port: int, **options: Any) -> Any:
    """Connect as aiokafka does, and note for the `kafka_errors` round it how that went."""
    attempts = _attempts.get() or _Attempts()
    try:
        connection = await _connect(host, port, **options)
    except Exception as exc:
        fault = _as_driver_error(exc)
        attempts.note((host, port), fault)
        if fault is exc:
            raise
        raise fault from exc
    attempts.note((host, port), None)
    return connection


def _as_driver_error(exc: Exception) -> Exception:
    """Return what the driver's own tasks survive: a SCRAM broker that does not prove itself is a ValueError to it."""
    if not isinstance(exc, ValueError) or isinstance(exc, (OSError, UnicodeError)):
        return exc
    refused: Exception = driver.SaslAuthenticationFailed(f"the broker does not prove that it knows the password: {exc}")
    return refused


# Here, because nobody makes a client without the options from here.
aiokafka.client.create_conn = _connect_and_note


@contextmanager
def kafka_errors(settings: Settings, *, topic: str | None = None) -> Iterator[None]:
    """Raise the errors of the driver inside the block as ours; `topic` is the one that is being used."""
    attempts, outer = _Attempts(), _attempts.get()
    _attempts.set(attempts)
    try:
        yield
    except (driver.KafkaError, driver.IllegalOperation, TimeoutError, OSError) as exc:
        raise translated(exc, settings, topic=topic, fault=attempts.fault) from exc
    finally:
        # Not by the token: an async generator may be closed in another context than it was opened in.
        _attempts.set(outer)


def translated(
    exc: Exception, settings: Settings, *, topic: str | None = None, fault: Exception | None = None
) -> StamplineError:
    """Return our error for one of the driver's: what is wrong, and what to do.

    Args:
        exc: what the driver raised.
        settings: where Kafka was looked for, and how.
        topic: the topic that was being used.
        fault: why the last connection failed, where one did.
    """
    place = f"Kafka at {settings.kafka_bootstrap_servers}"
    if isinstance(exc, driver.UnknownTopicOrPartitionError):
        return missing_topic(settings, topic or "that was asked for")
    shut_out = _shut_out(_reason(exc, fault), settings, place)
    if shut_out is not None:
        return shut_out
    if isinstance(exc, _FORBIDDEN):
        return TopicError(f"{place} does not allow this: {_said(exc)}; ask its operator for the right (an ACL)")
    if isinstance(exc, (driver.MessageSizeTooLargeError, driver.RecordListTooLargeError)):
        return InputRejected("too_large", f"{place} takes no record of this size: {_said(exc)}")
    if isinstance(exc, (TimeoutError, driver.KafkaTimeoutError, driver.RequestTimedOutError)):
        return ServiceUnavailable(
            f"{place} does not answer: no reply in time; check that its advertised listeners can be reached from here"
        )
    if isinstance(exc, driver.KafkaConnectionError):
        return ServiceUnavailable(f"{place} does not answer: start it, or set KAFKA_BOOTSTRAP_SERVERS")
    return ServiceUnavailable(f"{place} does not answer: {_said(exc)}")


def _reason(exc: Exception, fault: Exception | None) -> Exception | None:
    """Return why a broker could not be talked to, None where that is not what `exc` is about."""
    if not isinstance(exc, _UNREACHED):
        return exc if isinstance(exc, (*_REFUSED, ssl.SSLError)) else None
    if isinstance(fault, driver.KafkaConnectionError) and isinstance(fault.__cause__, ssl.SSLError):
        return fault.__cause__
    if fault is None and "bootstrap" in str(exc):
        # All was well until the first request, which is where a listener with a login hangs up on who has not.
        return ConnectionResetError()
    return fault


def _shut_out(reason: Exception | None, settings: Settings, place: str) -> StamplineError | None:
    """Return the error for a broker that is there and will not have us, None for one that is away."""
    protocol = settings.kafka_security_protocol
    if isinstance(reason, ssl.SSLCertVerificationError):
        return _untrusted(reason, place)
    if isinstance(reason, ssl.SSLError):
        return _no_tls(reason, settings, place)
    if isinstance(reason, driver.UnsupportedSaslMechanismError):
        return SettingsError(
            f"{place} does not know KAFKA_SASL_MECHANISM={settings.kafka_sasl_mechanism}: set one that it offers"
        )
    if isinstance(reason, driver.IllegalSaslStateError):
        return SettingsError(
            f"{place} has no login on that port, as KAFKA_SECURITY_PROTOCOL={protocol} wants one: "
            f"set {'SSL' if protocol == 'SASL_SSL' else 'PLAINTEXT'} or use another port"
        )
    if isinstance(reason, _REFUSED):
        said = reason.args[0] if reason.args and reason.args[0] else type(reason).__name__
        from_file = settings.kafka_sasl_password is None and settings.kafka_sasl_password_file is not None
        return SettingsError(
            f"{place} does not let user {settings.kafka_sasl_username} in ({said}): "
            f"check KAFKA_SASL_USERNAME and KAFKA_SASL_PASSWORD{'_FILE' if from_file else ''}"
        )
    if isinstance(reason, (driver.KafkaConnectionError, ConnectionResetError, ConnectionAbortedError, BrokenPipeError)):
        return ServiceUnavailable(
            f"{place} hangs up: it does not speak KAFKA_SECURITY_PROTOCOL={protocol} on that port, or is about to stop"
        )
    return None


def _untrusted(reason: ssl.SSLCertVerificationError, place: str) -> SettingsError:
    """Return the error for a certificate that we do not accept; each kind has another remedy."""
    said = reason.verify_message.rstrip(".")
    if reason.verify_code in _OTHER_NAME:
        return SettingsError(
            f"the certificate of {place} is for another name ({said}): "
            "use one that it is for, in KAFKA_BOOTSTRAP_SERVERS and in the broker's advertised listeners"
        )
    if reason.verify_code in _OTHER_TIME:
        return SettingsError(
            f"the certificate of {place} is not valid today ({said}): renew it, or the CA in KAFKA_SSL_CA; "
            "or is it the clock of this machine?"
        )
    return SettingsError(
        f"the certificate of {place} is not trusted ({said}): set KAFKA_SSL_CA to the CA that signed it"
    )


def _no_tls(reason: ssl.SSLError, settings: Settings, place: str) -> SettingsError:
    """Return the error for a broker that ended the TLS handshake, most likely because of our certificate."""
    # One that was not made by OpenSSL has no reason.
    said = (getattr(reason, "reason", None) or str(reason)).lower().replace("_", " ")
    if "certificate" not in said and "unknown ca" not in said:
        return SettingsError(
            f"{place} does not speak TLS with us, as KAFKA_SECURITY_PROTOCOL={settings.kafka_security_protocol} "
            f"wants it ({said})"
        )
    if settings.kafka_ssl_cert is None:
        return SettingsError(f"{place} wants a client certificate ({said}): set KAFKA_SSL_CERT and KAFKA_SSL_KEY")
    return SettingsError(f"{place} does not accept the certificate in KAFKA_SSL_CERT ({said}): set one that it trusts")


def missing_topic(settings: Settings, topic: str) -> TopicError:
    """Return the error for a topic that is not there."""
    return TopicError(
        f"Kafka at {settings.kafka_bootstrap_servers} has no topic {topic}: run `stampline topics create`"
    )


def _said(exc: Exception) -> str:
    """Tell the error with its name, which the driver's own errors have in their text already."""
    return str(exc) if type(exc).__name__ in str(exc) else f"{type(exc).__name__}: {exc}".rstrip(": ")
