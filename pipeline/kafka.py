"""How to reach Kafka: the options that every client shares, the partition of a key, and the driver's errors in ours.

Imports the settings, the errors and aiokafka; opens nothing by itself.
"""

from __future__ import annotations

import ssl
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final

from aiokafka import errors as driver

from pipeline import recordbatches
from pipeline.errors import InputRejected, ServiceUnavailable, SettingsError, StamplineError, TopicError
from pipeline.settings import Settings

# Here, because nobody makes a consumer without the options from here.
recordbatches.install()

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
_FORBIDDEN: Final = (
    driver.TopicAuthorizationFailedError,
    driver.GroupAuthorizationFailedError,
    driver.ClusterAuthorizationFailedError,
    driver.TransactionalIdAuthorizationFailed,
)


def kafka_options(settings: Settings) -> dict[str, Any]:
    """Return the arguments that aiokafka's producers, consumers and admin clients have in common.

    Raises:
        SettingsError: a certificate cannot be loaded; names the variable.
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
        options["sasl_plain_password"] = settings.kafka_sasl_secret
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


@contextmanager
def kafka_errors(settings: Settings, *, topic: str | None = None) -> Iterator[None]:
    """Raise the errors of the driver inside the block as ours; `topic` is the one that is being used."""
    try:
        yield
    except (driver.KafkaError, driver.IllegalOperation, TimeoutError, OSError) as exc:
        raise translated(exc, settings, topic=topic) from exc


def translated(exc: Exception, settings: Settings, *, topic: str | None = None) -> StamplineError:
    """Return our error for one of the driver's: what is wrong, and what to do."""
    place = f"Kafka at {settings.kafka_bootstrap_servers}"
    if isinstance(exc, driver.UnknownTopicOrPartitionError):
        return missing_topic(settings, topic or "that was asked for")
    if isinstance(exc, _REFUSED):
        return SettingsError(f"KAFKA_SECURITY_PROTOCOL, KAFKA_SASL_*: {place} does not let us in: {exc}")
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


def missing_topic(settings: Settings, topic: str) -> TopicError:
    """Return the error for a topic that is not there."""
    return TopicError(
        f"Kafka at {settings.kafka_bootstrap_servers} has no topic {topic}: run `stampline topics create`"
    )


def _said(exc: Exception) -> str:
    """Tell the error with its name, which the driver's own errors have in their text already."""
    return str(exc) if type(exc).__name__ in str(exc) else f"{type(exc).__name__}: {exc}".rstrip(": ")
