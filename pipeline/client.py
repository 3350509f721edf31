"""The client of producers: sends file events to Kafka and says where each one stands.

Works without the rest of stampline::

    async with EventProducer(load_settings()) as producer:
        token = await producer.send(event)

        answer = await producer.wait(token, timeout_seconds=2)

The answer to an event is a token, `file-events:PARTITION:OFFSET`; `wait_for` in PostgreSQL and `GET /api/v1/wait` take
it as well. Whoever does not wait needs no PostgreSQL.

An event is checked here as the hasher checks it, so that its sender hears of a mistake, and not the dead letters.
Imports aiokafka, and of ours the wire schema, the names of the topics and `pipeline.kafka`.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Iterable, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final, NamedTuple, Self

from aiokafka import AIOKafkaProducer

from pipeline.errors import InvalidToken, ServiceUnavailable
from pipeline.events import RECORD_MAX_BYTES, URI_MAX_BYTES, FileEvent, decode_event, encode_event
from pipeline.kafka import abandon, kafka_errors, kafka_options, missing_topic, partition_for
from pipeline.settings import Settings
from pipeline.topics import FILE_EVENTS, has_transactions, topic_name

if TYPE_CHECKING:
    from pipeline.waiting import Answer, Waiter

# As `wait_for` in PostgreSQL has it.
_TOKEN: Final = re.compile(rf"{FILE_EVENTS}:([0-9]{{1,9}}):([0-9]{{1,18}})")
_BATCH_BYTES_MAX: Final = 1024 * 1024
# The largest record of the contract, its key and what Kafka puts round them.
_REQUEST_BYTES_MAX: Final = RECORD_MAX_BYTES + URI_MAX_BYTES + 64 * 1024
# A topic that was created a moment ago may take so long to be known to every broker.
_METADATA_TIMEOUT_S: Final = 5.0
_METADATA_PAUSE_S: Final = 0.1
# A broker that does not answer gets a second chance at another address.
_DELIVERY_ATTEMPTS: Final = 2


class Position(NamedTuple):
    """Where an event stands in `file-events`."""

    partition: int
    offset: int

    @property
    def token(self) -> str:
        """The position as producers and analysts write it; the topic without the prefix of the installation."""
        return f"{FILE_EVENTS}:{self.partition}:{self.offset}"

    @classmethod
    def parse(cls, token: str) -> Self:
        """Return the position that a token stands for.

        Raises:
            InvalidToken: it is no token.
        """
        found = _TOKEN.fullmatch(token)
        if found is None:
            raise InvalidToken(f"{token!r} is no token. {InvalidToken.__doc__}")
        return cls(int(found[1]), int(found[2]))


class EventProducer:
    """Sends file events; an async context manager.

    Args:
        settings: where Kafka is, and the prefix of its topics.
    """

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._topic = topic_name(settings, FILE_EVENTS)
        self._delivery_timeout_s = _DELIVERY_ATTEMPTS * settings.kafka_request_timeout_ms / 1000
        self._driver: Any = None
        self._waiter: Waiter | None = None

    @property
    def topic(self) -> str:
        """The topic with its prefix."""
        return self._topic

    @property
    def partitions(self) -> int:
        """How many partitions the topic has."""
        return len(self._opened().client.cluster.partitions_for_topic(self._topic) or ())

    async def __aenter__(self) -> Self:
        """Connect and look for the topic.

        Raises:
            ServiceUnavailable: Kafka does not answer.
            TopicError: there is no such topic.
        """
        assert self._driver is None, "a producer is opened once"
        idempotent = await has_transactions(self._settings)
        self._driver = AIOKafkaProducer(
            **kafka_options(self._settings),
            client_id="stampline-client",
            acks="all",
            # Retries never write twice. The embedded broker cannot do that: what is written twice there still counts
            # once, by its event id.
            enable_idempotence=idempotent,
            linger_ms=0,  # what comes while a request is out goes into the next: batches without a delay
            max_batch_size=_BATCH_BYTES_MAX,
            max_request_size=_REQUEST_BYTES_MAX,
        )
        try:
            with kafka_errors(self._settings, topic=self._topic):
                async with asyncio.timeout(self._delivery_timeout_s):
                    # With an advertised address that leads nowhere the driver would try for ever.
                    await self._driver.start()
                await self._find_topic()
        except BaseException:
            await self.aclose()
            raise
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Deliver what is under way and disconnect."""
        await self.aclose()

    async def aclose(self) -> None:
        """Deliver what is under way, for a bounded time, and disconnect. May be called twice."""
        producer, self._driver = self._driver, None
        waiter, self._waiter = self._waiter, None
        try:
            if waiter is not None:
                await waiter.aclose()
        finally:
            if producer is not None:
                await self._stop(producer)

    async def _stop(self, producer: Any) -> None:
        try:
            async with asyncio.timeout(self._delivery_timeout_s):
                await producer.stop()
        except TimeoutError:
            await abandon(producer, "the producer was closed before Kafka answered")

    async def send(self, event: FileEvent) -> str:
        """Send one event and wait until Kafka has it.

        Returns:
            The token of the event.

        Raises:
            InputRejected: the event breaks the contract.
            ServiceUnavailable: Kafka did not answer in time; the event may have arrived, so send it again with the
                same event id.
            TopicError: the topic has gone, or we may not write to it.
        """
        producer = self._opened()
        key, value = _encoded(event)
        with kafka_errors(self._settings, topic=self._topic):
            future = await producer.send(
                self._topic, value=value, key=key, partition=partition_for(key, self.partitions)
            )
            await self._delivered([future])
            sent = future.result()
        return Position(sent.partition, sent.offset).token

    async def send_all(self, events: Iterable[FileEvent]) -> list[Position]:
        """Send many events, whole record batches at a time, and wait until Kafka has them all.

        The events of one uri keep their order. Bounded by what the caller passes: a few thousand events are enough
        for full speed.

        Returns:
            The position of each event, in the order given.

        Raises:
            InputRejected: an event breaks the contract; nothing was sent.
            ServiceUnavailable: as for `send`; send them all again with the same event ids.
            TopicError: as for `send`.
        """
        encoded = [_encoded(event) for event in events]
        with kafka_errors(self._settings, topic=self._topic):
            return await self._send_batches(encoded)

    async def wait(self, token: str, timeout_seconds: float) -> Answer:
        """Wait until an event that was sent is visible in PostgreSQL, or it is known that it will not be.

        Any number of waits share one connection, which is made for the first of them.

        Args:
            token: what `send` returned, here or elsewhere.
            timeout_seconds: the longest wait, more than 0.

        Raises:
            InvalidToken: it is no token.
            ServiceUnavailable: PostgreSQL did not answer in that time.
            SettingsError: PostgreSQL does not let us in, or lacks the tables.
        """
        self._opened()
        if self._waiter is None:
            # Whoever only sends needs neither PostgreSQL nor its driver.
            from pipeline.waiting import Waiter  # noqa: PLC0415

            self._waiter = Waiter(self._settings)
        return await self._waiter.wait(token, timeout_seconds)

    async def flush(self) -> None:
        """Wait until everything that was sent has been delivered.

        Raises:
            ServiceUnavailable: Kafka did not answer in time.
        """
        with kafka_errors(self._settings, topic=self._topic):
            async with asyncio.timeout(self._delivery_timeout_s):
                await self._opened().flush()

    async def _send_batches(self, encoded: Sequence[tuple[bytes, bytes]]) -> list[Position]:
        """Put the records into one open batch per partition and submit each batch as it fills."""
        producer = self._opened()
        partitions = self.partitions
        opened: dict[int, Any] = {}
        # One entry per batch: its partition, the indexes of its records in `encoded`, its delivery.
        members: dict[int, list[int]] = {}
        submitted: list[tuple[int, list[int], asyncio.Future[Any]]] = []

        async def submit(partition: int) -> None:
            builder = opened.pop(partition)
            builder.close()  # a closed batch does not linger
            future = await producer.send_batch(builder, self._topic, partition=partition)
            submitted.append((partition, members.pop(partition), future))

        for index, (key, value) in enumerate(encoded):
            partition = partition_for(key, partitions)
            builder = opened.get(partition)
            if builder is not None and builder.append(timestamp=None, key=key, value=value) is None:
                await submit(partition)
                builder = None
            if builder is None:
                builder = opened[partition] = producer.create_batch()
                members[partition] = []
                first = builder.append(timestamp=None, key=key, value=value)
                assert first is not None, "an empty batch takes a record of any size"
            members[partition].append(index)
        for partition in tuple(opened):
            await submit(partition)

        await self._delivered([future for _, _, future in submitted])
        positions: dict[int, Position] = {}
        for partition, indexes, future in submitted:
            base = future.result().offset
            positions.update((index, Position(partition, base + place)) for place, index in enumerate(indexes))
        return [positions[index] for index in range(len(encoded))]

    async def _delivered(self, futures: Sequence[asyncio.Future[Any]]) -> None:
        """Wait for deliveries; the first error of one is raised, after all have ended."""
        for future in futures:
            future.add_done_callback(_retrieve)
        if not futures:
            return
        _, pending = await asyncio.wait(futures, timeout=self._delivery_timeout_s)
        if pending:
            if not self.partitions:
                raise missing_topic(self._settings, self._topic)
            raise ServiceUnavailable(
                f"Kafka at {self._settings.kafka_bootstrap_servers} does not answer: "
                f"{self._topic} took nothing for {self._delivery_timeout_s:g} s"
            )
        for future in futures:
            future.result()

    async def _find_topic(self) -> None:
        """Wait for a topic that is just being made, but not for ever.

        The driver is never told the topic's name: it asks for all topics then, and asking for one by name would create
        it, with the wrong number of partitions, on a broker that allows that.
        """
        deadline = asyncio.get_running_loop().time() + _METADATA_TIMEOUT_S
        while True:
            async with asyncio.timeout(self._delivery_timeout_s):
                await self._driver.client.force_metadata_update()
            if self.partitions:
                return
            if asyncio.get_running_loop().time() > deadline:
                raise missing_topic(self._settings, self._topic)
            await asyncio.sleep(_METADATA_PAUSE_S)

    def _opened(self) -> Any:
        assert self._driver is not None, "use `async with EventProducer(…)`"
        return self._driver


def _encoded(event: FileEvent) -> tuple[bytes, bytes]:
    """Return key and value of an event that keeps the contract."""
    key, value = event.uri.encode(), encode_event(event)
    decode_event(key, value)
    return key, value


def _retrieve(future: asyncio.Future[Any]) -> None:
    """Look at the error of a delivery that nobody waits for any more, or asyncio complains about it."""
    if not future.cancelled():
        future.exception()
