"""The events that a bench is made of, and their road into Kafka.

The same load gives the same events, so that two systems can be measured on equal work. The contents of one file
follow each other through a small pool and never repeat at once: every event changes its file, none is `unchanged`.
Imports confluent-kafka, of the development tools: a producer of our own would be part of what is measured.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any, Final

from confluent_kafka import Producer

from pipeline.errors import ServiceUnavailable
from pipeline.events import FileEvent, encode_event
from pipeline.settings import Settings

#: For clients inside this process: what goes wrong comes as an error, nothing is printed beside it.
SILENT: Final = {"log_level": 0}

#: Bytes of each event's inline content.
CONTENT_BYTES: Final = 1024

_CONTENTS: Final = 256
_BEGIN: Final = datetime(2026, 1, 1, tzinfo=UTC)
_POLL_EVENTS: Final = 2000
_FLUSH_SECONDS: Final = 120


@dataclass(frozen=True, slots=True)
class Load:
    """How many events, and over how many files; every file has one at least."""

    events: int
    uris: int
    seed: int = 7

    def __post_init__(self) -> None:
        assert 0 < self.uris <= self.events


def file_events(load: Load) -> Iterator[FileEvent]:
    """Yield the events of a load: first one for each file, then at random."""
    draw = random.Random(load.seed)
    contents = [draw.randbytes(CONTENT_BYTES) for _ in range(_CONTENTS)]
    versions = [0] * load.uris
    for number in range(load.events):
        file = number if number < load.uris else draw.randrange(load.uris)
        versions[file] += 1
        yield FileEvent(
            event_id=f"{load.seed:x}-{number:012x}",
            uri=f"file:///data/{file:08d}.bin",
            op="created" if versions[file] == 1 else "modified",
            occurred_at=_BEGIN + timedelta(milliseconds=number),
            size=CONTENT_BYTES,
            content=contents[(file + versions[file]) % _CONTENTS],
        )


def produce(load: Load, topic: str, options: Mapping[str, Any]) -> Counter[str]:
    """Send all events of a load to a topic and wait until Kafka has them; return the number of events of each uri.

    Raises:
        ServiceUnavailable: not all were delivered.
    """
    failed: list[str] = []
    producer = Producer(
        {
            **options,
            **SILENT,
            "partitioner": "murmur2",
            "linger.ms": 5,
            "enable.idempotence": True,
            "delivery.report.only.error": True,
            "on_delivery": lambda error, _message: failed.append(str(error)),
        }
    )
    counts: Counter[str] = Counter()
    for number, event in enumerate(file_events(load)):
        counts[event.uri] += 1
        _send(producer, topic, event)
        if number % _POLL_EVENTS == 0:
            producer.poll(0)
    late = producer.flush(_FLUSH_SECONDS)
    if late or failed:
        reason = failed[0] if failed else f"{late} are still under way after {_FLUSH_SECONDS} s"
        raise ServiceUnavailable(f"the events of the bench did not all reach Kafka: {reason}")
    return counts


def _send(producer: Producer, topic: str, event: FileEvent) -> None:
    while True:
        try:
            producer.produce(topic, key=event.uri.encode(), value=encode_event(event))
        except BufferError:
            producer.poll(0.05)
        else:
            return


def librdkafka_options(settings: Settings) -> dict[str, str]:
    """Return how to reach Kafka, as every client on librdkafka takes it."""
    protocol = settings.kafka_security_protocol
    options = {
        "bootstrap.servers": settings.kafka_bootstrap_servers,
        "security.protocol": protocol,
        "sasl.mechanism": settings.kafka_sasl_mechanism if protocol.startswith("SASL") else None,
        "sasl.username": settings.kafka_sasl_username,
        "sasl.password": settings.kafka_sasl_secret,
        "ssl.ca.location": settings.kafka_ssl_ca,
        "ssl.certificate.location": settings.kafka_ssl_cert,
        "ssl.key.location": settings.kafka_ssl_key,
    }
    return {name: str(value) for name, value in options.items() if value is not None}
