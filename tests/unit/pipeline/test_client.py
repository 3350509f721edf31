"""The producers' client, as far as it needs no Kafka: what it says when there is none, and that it always ends."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from datetime import UTC, datetime

import pytest

from pipeline.client import EventProducer, Position
from pipeline.errors import InputRejected, ServiceUnavailable
from pipeline.events import FileEvent
from pipeline.settings import Settings

pytestmark = pytest.mark.unit


@pytest.fixture
async def silent_port() -> AsyncIterator[int]:
    """A port that takes connections and never says a word."""
    writers = []

    async def accept(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writers.append(writer)

    server = await asyncio.start_server(accept, "127.0.0.1", 0)
    yield server.sockets[0].getsockname()[1]
    server.close()
    for writer in writers:
        writer.close()


def _settings(port: int) -> Settings:
    return Settings(kafka_bootstrap_servers=f"127.0.0.1:{port}", kafka_request_timeout_ms=1000)


async def test_without_kafka_the_client_says_where_it_looked() -> None:
    """A refused connection is told at once, with the address and what to check."""
    with pytest.raises(ServiceUnavailable, match=r"Kafka at 127\.0\.0\.1:1 does not answer.*KAFKA_BOOTSTRAP_SERVERS"):
        async with EventProducer(_settings(1)):
            pass


async def test_a_port_that_never_answers_does_not_hang_the_client(silent_port: int) -> None:
    """A firewall or another service behind the port ends in the same error, within the time allowed."""
    async with asyncio.timeout(10):
        with pytest.raises(ServiceUnavailable, match="does not answer"):
            async with EventProducer(_settings(silent_port)):
                pass


async def test_a_client_that_never_opened_can_be_closed() -> None:
    """Closing is always safe, and twice is as good as once."""
    producer = EventProducer(_settings(1))
    await producer.aclose()
    await producer.aclose()


async def test_an_event_that_breaks_the_contract_is_refused_before_it_is_sent() -> None:
    """Its sender hears which field is wrong; no connection is needed for that."""
    event = FileEvent(event_id="", uri="file:///a", op="created", occurred_at=datetime.now(UTC))
    with pytest.raises(InputRejected, match="event_id"):
        await EventProducer(_settings(1)).send_all([event])


def test_a_token_names_topic_partition_and_offset() -> None:
    """The form that `wait_for` and the API take."""
    assert Position(3, 4711).token == "file-events:3:4711"
