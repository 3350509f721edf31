"""Acting on dead letters: sending their originals in again, or dropping them.

What was done with a letter is a mark in the topic of dead letters (`pipeline/records.py`), and the event and its mark
are one Kafka transaction: a crash leaves both or neither. PostgreSQL learns of the mark from the topic, a little later.

No letter is sent in twice, whoever else is at it. All who act have one transactional id, so who begins fences who began
before, and reads the marks in the topic only then: every mark that the other one could still commit is among them. On
the embedded broker, which has no transactions, the event goes first and then its mark: a crash between the two, or two
operators at the same moment, may send an event in twice. It is applied once, by its event id.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from datetime import UTC, datetime
from types import TracebackType
from typing import Any, Final, Literal, NamedTuple, Self

from aiokafka import AIOKafkaConsumer, AIOKafkaProducer, TopicPartition
from aiokafka.errors import InvalidProducerEpoch, KafkaError, ProducerFenced

from pipeline.errors import ServiceUnavailable, StamplineError
from pipeline.kafka import abandon, kafka_errors, kafka_options, translated
from pipeline.letters import FoundLetter, FullLetter, LetterShelf
from pipeline.logreader import LogReader
from pipeline.records import LetterId, MarkStatus, Record, mark_letter, read_mark, replayed
from pipeline.settings import Settings
from pipeline.topics import (
    DEAD_LETTERS,
    FILE_STAMPS,
    RECORD_BATCH_MAX_BYTES,
    TOPICS,
    check_topics,
    has_transactions,
    topic_name,
)
from projections.dead_letters import FOREIGN, NO_LETTER

Action = Literal["replay", "drop"]

#: One transaction takes no more than this.
_LETTERS_MAX: Final = 200
_BYTES_MAX: Final = 8 * 2**20
#: How long the transactions of others may keep marks from being read, in s: longer than any of them lives.
_MARKS_SECONDS: Final = 60.0
#: How long an abort may take before it is left to fencing, in s.
_ABORT_SECONDS: Final = 1.0

_BECOMES: Final[Mapping[Action, MarkStatus]] = {"replay": "replayed", "drop": "dropped"}


class Refusal(NamedTuple):
    """A letter that is left alone, and why."""

    letter: LetterId
    why: str


class Acted(NamedTuple):
    """What was done with a letter; `token` is where its event stands now, None where it was dropped."""

    letter: LetterId
    token: str | None


@dataclass(frozen=True, slots=True)
class Done:
    """What one transaction did, and which letters it left alone: somebody else was faster."""

    acted: list[Acted]
    refused: list[Refusal]


class _Placed(NamedTuple):
    topic: str
    partition: int
    record: Record


class LetterDesk:
    """Where letters are acted on.

    Args:
        settings: where Kafka is.
        shelf: the letters.
        action: what is done with them.
        force: also with those that something was done with before.
    """

    def __init__(self, settings: Settings, shelf: LetterShelf, action: Action, *, force: bool) -> None:
        self._settings = settings
        self._shelf = shelf
        self._action: Action = action
        self._force = force
        self._topic = topic_name(settings, DEAD_LETTERS)
        self._partitions: dict[str, int] = {}
        self._inputs: frozenset[str] = frozenset()

    async def judge(self, letters: Sequence[FoundLetter]) -> list[Refusal]:
        """Return those of `letters` that nothing can be done with, by what is known now; change nothing.

        Raises:
            ServiceUnavailable: Kafka or PostgreSQL does not answer.
        """
        marks = await self._read_marks()
        refusals = [(letter.id, self._refuse(letter, marks)) for letter in letters]
        return [Refusal(letter, why) for letter, why in refusals if why is not None]

    async def act(self, letters: Sequence[FoundLetter]) -> AsyncGenerator[Done, None]:
        """Act on letters, a bounded number in each transaction, and tell of each when it is committed.

        Raises:
            StamplineError: somebody else has begun to act on letters; what was told of is done, and nothing else.
            ServiceUnavailable: Kafka or PostgreSQL does not answer; of the newest transaction nothing was done, or all
                of it. Doing the same again is safe.
        """
        async with _Sender(self._settings, transactions=await has_transactions(self._settings)) as sender:
            # In this order: first nobody else can commit a mark, then those that there are can be known.
            marks = await self._read_marks()
            for portion in _portions(letters):
                full = await self._shelf.read([letter.id for letter in portion])
                refused = [
                    Refusal(letter.found.id, why)
                    for letter in full
                    if (why := self._refuse(letter.found, marks)) is not None
                ]
                left_out = {refusal.letter for refusal in refused}
                wanted = [letter for letter in full if letter.found.id not in left_out]
                yield Done(await self._commit(sender, wanted) if wanted else [], refused)

    async def _commit(self, sender: _Sender, letters: Sequence[FullLetter]) -> list[Acted]:
        now = datetime.now(UTC)
        status = _BECOMES[self._action]
        marks = [
            # In the partition of the letter, which is that of its original where our topics have it.
            _Placed(
                self._topic,
                letter.found.id.partition % self._partitions[self._topic],
                mark_letter(letter.found.id, status, now),
            )
            for letter in letters
        ]
        if self._action == "drop":
            await sender.write([], marks)
            return [Acted(letter.found.id, None) for letter in letters]
        events = [
            _Placed(letter.found.id.topic, letter.found.id.partition, replayed(letter.original, letter.found.id))
            for letter in letters
        ]
        offsets = await sender.write(events, marks)
        prefix = topic_name(self._settings, "")
        return [
            Acted(letter.found.id, f"{event.topic.removeprefix(prefix)}:{event.partition}:{offset}")
            for letter, event, offset in zip(letters, events, offsets, strict=True)
        ]

    def _refuse(self, letter: FoundLetter, marks: Mapping[LetterId, MarkStatus]) -> str | None:
        """Return why nothing can be done with a letter, None where something can."""
        status = marks.get(letter.id, letter.status)
        if self._action == "replay":
            why = self._refuse_replay(letter)
            if why is not None:
                return why
        if status != "open" and not self._force:
            return f"it was {status} before; --force does it all the same"
        return None

    def _refuse_replay(self, letter: FoundLetter) -> str | None:
        if letter.letter_offset == NO_LETTER:
            return "only its mark is known, its content is not there any more"
        if letter.reason == FOREIGN:
            return "it is no dead letter of stampline and has no topic to go back to: drop it"
        if letter.reason == "projection_refused" or letter.id.topic.endswith("-changelog"):
            return (
                "it is a change that PostgreSQL refused, and a changelog takes nothing twice: mend the tables, then "
                "run `stampline projections rebuild NAME` for every projection; or drop it"
            )
        if letter.id.topic not in self._inputs:
            return f"{letter.id.topic} is no topic that events come in by: drop it"
        if letter.id.partition >= self._partitions[letter.id.topic]:
            return f"{letter.id.topic} has no partition {letter.id.partition} any more: drop it"
        return None

    async def _read_marks(self) -> dict[LetterId, MarkStatus]:
        """Return the marks that PostgreSQL may not show yet."""
        checks = {check.name: check for check in await check_topics(self._settings)}
        if checks[self._topic].partitions is None:
            raise StamplineError(checks[self._topic].fault)
        self._partitions = {name: check.partitions for name, check in checks.items() if check.partitions is not None}
        self._inputs = (
            frozenset(
                topic_name(self._settings, spec.name)
                for spec in TOPICS
                if spec.name not in {DEAD_LETTERS, FILE_STAMPS} and spec.configs["cleanup.policy"] != "compact"
            )
            & self._partitions.keys()
        )
        starts = await self._shelf.watermarks()
        ends = await self._find_ends()
        found = await asyncio.gather(
            *(self._read_marks_of(partition, starts.get(partition, 0), end) for partition, end in ends.items())
        )
        return {letter: status for marks in found for letter, status in marks.items()}

    async def _find_ends(self) -> dict[int, int]:
        """Return the offset after the last record of each partition, be it committed or not."""
        tps = [TopicPartition(self._topic, partition) for partition in range(self._partitions[self._topic])]
        consumer = AIOKafkaConsumer(**kafka_options(self._settings))
        with kafka_errors(self._settings, topic=self._topic):
            try:
                await consumer.start()
                ends: dict[TopicPartition, int] = await consumer.end_offsets(tps)
            finally:
                await consumer.stop()
        return {tp.partition: end for tp, end in ends.items()}

    async def _read_marks_of(self, partition: int, start: int, end: int) -> dict[LetterId, MarkStatus]:
        marks: dict[LetterId, MarkStatus] = {}
        async with LogReader(self._settings, self._topic, partition) as reader:
            # The embedded broker tells the base of its last batch as the end.
            end = max(end, await reader.find_end())
            start = max(start, reader.begin)
            if start >= end:
                return marks
            try:
                async with asyncio.timeout(_MARKS_SECONDS), aclosing(_follow(reader, start)) as following:
                    async for records in following:
                        found = [read_mark(record.headers) for record in records]
                        marks.update((mark.id, mark.status) for mark in found if mark is not None)
                        if reader.position >= end:
                            break
            except TimeoutError as exc:
                raise ServiceUnavailable(
                    f"{reader.place} cannot be read to its end: a transaction in it does not end; try again later"
                ) from exc
        return marks


async def _follow(reader: LogReader, start: int) -> AsyncGenerator[Sequence[Any], None]:
    async for records in reader.follow(start):
        yield records


def _portions(letters: Sequence[FoundLetter]) -> list[list[FoundLetter]]:
    """Cut letters into what one transaction takes; a single one may be larger."""
    portions: list[list[FoundLetter]] = []
    taken_bytes = 0
    for letter in letters:
        taken_bytes += letter.payload_bytes
        if not portions or len(portions[-1]) == _LETTERS_MAX or taken_bytes > _BYTES_MAX:
            portions.append([])
            taken_bytes = letter.payload_bytes
        portions[-1].append(letter)
    return portions


class _Sender:
    """Writes events and marks together; an async context manager, and the only one of the deployment."""

    def __init__(self, settings: Settings, *, transactions: bool) -> None:
        self._settings = settings
        self._transactions = transactions
        self._timeout_seconds = 2 * settings.kafka_request_timeout_ms / 1000
        self._producer = AIOKafkaProducer(
            **kafka_options(settings),
            acks="all",
            enable_idempotence=transactions,
            transactional_id=topic_name(settings, "stampline-dlq") if transactions else None,
            # The broker aborts what a dead process left open, so that readers of committed records can go on.
            transaction_timeout_ms=max(1000, settings.kafka_session_timeout_ms - 1000),
            max_batch_size=RECORD_BATCH_MAX_BYTES // 2,
            max_request_size=RECORD_BATCH_MAX_BYTES + 2**20,
        )

    async def __aenter__(self) -> Self:
        """Connect; from then on nobody else commits.

        Raises:
            ServiceUnavailable: Kafka does not answer.
        """
        try:
            with kafka_errors(self._settings):
                async with asyncio.timeout(self._timeout_seconds):
                    await self._producer.start()
        except BaseException:
            await self._close()
            raise
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self._close()

    async def _close(self) -> None:
        try:
            async with asyncio.timeout(self._timeout_seconds):
                await self._producer.stop()
        except TimeoutError:
            await abandon(self._producer, "closed before Kafka answered")

    async def write(self, events: Sequence[_Placed], marks: Sequence[_Placed]) -> list[int]:
        """Write events and their marks, all or nothing, and return the offset of each event.

        Raises:
            StamplineError: another one has taken over; nothing was written.
            ServiceUnavailable: nothing was written, or all of it.
            InputRejected: Kafka does not take a record of this size; nothing was written.
        """
        try:
            async with asyncio.timeout(self._timeout_seconds):
                if not self._transactions:
                    offsets = await self._deliver(events)
                    await self._deliver(marks)
                    return offsets
                await self._producer.begin_transaction()
                offsets = (await self._deliver([*events, *marks]))[: len(events)]
                await self._producer.commit_transaction()
        except (ProducerFenced, InvalidProducerEpoch) as exc:
            raise StamplineError(
                "somebody else has begun to act on dead letters, so this stopped; "
                "what was done until then is marked: look again, and go on with the rest"
            ) from exc
        except (KafkaError, TimeoutError) as exc:
            await self._abort()
            raise translated(exc, self._settings) from exc
        except BaseException:
            await self._abort()
            raise
        return offsets

    async def _abort(self) -> None:
        """Abort, or leave it to the broker: it aborts by itself what nobody commits."""
        if not self._transactions:
            return
        try:
            async with asyncio.timeout(_ABORT_SECONDS):
                await self._producer.abort_transaction()
        except (KafkaError, TimeoutError, AssertionError):
            pass

    async def _deliver(self, placed: Sequence[_Placed]) -> list[int]:
        """Send records, wait until they are delivered, and return the offset of each."""
        by_place: dict[tuple[str, int], list[int]] = {}
        for index, (topic, partition, _) in enumerate(placed):
            by_place.setdefault((topic, partition), []).append(index)
        sent: list[tuple[list[int], asyncio.Future[object]]] = []
        for (topic, partition), indexes in by_place.items():
            builder, members = self._producer.create_batch(), list[int]()
            for index in indexes:
                key, value, headers = placed[index].record
                record = {"timestamp": None, "key": key, "value": value, "headers": list(headers)}
                if builder.append(**record) is None:
                    sent.append((members, await self._producer.send_batch(builder, topic, partition=partition)))
                    builder, members = self._producer.create_batch(), list[int]()
                    builder.append(**record)
                members.append(index)
            sent.append((members, await self._producer.send_batch(builder, topic, partition=partition)))
        await asyncio.gather(*(delivery for _, delivery in sent))
        offsets = [0] * len(placed)
        for members, delivery in sent:
            for place, index in enumerate(members):
                offsets[index] = delivery.result().offset + place  # type: ignore[attr-defined] # aiokafka is not typed
        return offsets
