"""Each role is killed at every point between fetch and the end of a batch, one after the other: nothing changes.

`tests/chaos/crashing_node.py` says what a point is, and does the killing. Events keep coming meanwhile, bad ones among
them; what came out is compared with what was sent, and by nothing that stampline computes itself. The retry role has a
test of its own: what it sends in again would be inputs that the others' test did not send.
"""

from __future__ import annotations

import json
import random
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

import pytest
from aiokafka import AIOKafkaProducer
from blake3 import blake3

from agents.retry import DUE_HEADER
from pipeline.client import Position
from pipeline.events import ATTEMPT_HEADER, FileEvent, encode_event
from pipeline.logreader import LogReader
from pipeline.scan import file_uri
from pipeline.settings import Settings
from pipeline.topics import DEAD_LETTERS, FILE_EVENTS, RETRY, create_topics, topic_name
from pipeline.verify import all_faults, verify
from pipeline.worker import ROLES
from tests.fix_road import NodeProcess, Road, ending
from tests.fix_services import MakeSettings

pytestmark = [pytest.mark.integration, pytest.mark.timeout(300)]

#: Events sent after each kill; the most that the killed role takes in one batch, so that each batch holds all kinds.
BURST: Final = 200
#: Bursts sent before the first kill: there is always a whole batch waiting.
AHEAD: Final = 3
URIS: Final = 150

#: Those that take part in the test of each other; without the retry role, what is deferred stays so.
CHAIN: Final = tuple(role for role in ROLES if role != "retry")

#: Where it matters most that a process was killed, asked and answered: a test of the test.
DECISIVE: Final = {
    "hasher": ("FileHasher.digest", "_send_produce_req", "AIOKafkaConsumer.commit"),
    "reducer": ("_send_produce_req", "_do_txn_offset_commit", "_do_txn_commit"),
    "retry": ("sleep", "_send_produce_req", "_do_txn_offset_commit", "_do_txn_commit"),
    "projector": ("Connection.copy_records_to_table", "Transaction.__commit"),
}


@dataclass
class Sent:
    """What was sent, and what has to come of it."""

    settings: Settings
    producer: AIOKafkaProducer
    folder: Path
    chance: random.Random
    bursts: int = 0
    #: Of every uri: how many changes, and the digest after the last of them.
    versions: Counter[str] = field(default_factory=Counter)
    digests: dict[str, str] = field(default_factory=dict)
    #: Of every outcome that can be told apart by its input: the offsets of those inputs.
    outcomes: dict[str, list[int]] = field(default_factory=dict)

    async def send_burst(self) -> None:
        """Send the next burst: mostly changes, the other kinds at places that the seed draws."""
        self.bursts += 1
        kinds = [*("rejected", "deferred", "gave_up", "fetched") * 2, *["changed"] * (BURST - 8)]
        self.chance.shuffle(kinds)
        records = [self._make(kind, f"{self.bursts}-{number}") for number, kind in enumerate(kinds)]
        topic = topic_name(self.settings, FILE_EVENTS)
        futures = [
            await self.producer.send(topic, value=value, key=key, headers=headers, partition=0)
            for key, value, headers in records
        ]
        for kind, future in zip(kinds, futures, strict=True):
            outcome = "committed" if kind in {"fetched", "changed"} else kind
            self.outcomes.setdefault(outcome, []).append((await future).offset)

    def _make(self, kind: str, name: str) -> tuple[bytes, bytes, list[tuple[str, bytes]]]:
        if kind == "rejected":
            return b"file:///bad", f"no JSON at all: {name}".encode(), []
        fields: dict[str, Any] = {"uri": f"file:///made/{self.chance.randrange(URIS)}.bin", "content": name.encode()}
        if kind == "fetched":
            path = self.folder / f"{name}.bin"
            path.write_bytes(name.encode())
            fields = {"uri": file_uri(str(path))}
        elif kind != "changed":
            fields["expected_version"] = 1_000_000
        if "expected_version" not in fields:
            self.versions[fields["uri"]] += 1
            self.digests[fields["uri"]] = blake3(name.encode()).hexdigest()
        event = FileEvent(event_id=name, op="modified", occurred_at=datetime.now(UTC), **fields)
        headers = [(ATTEMPT_HEADER, b"%d" % self.settings.retry_max_attempts)] if kind == "gave_up" else []
        return event.uri.encode(), encode_event(event), headers

    @property
    def last(self) -> Position:
        """Where the last of all events stands."""
        return Position(0, max(offset for offsets in self.outcomes.values() for offset in offsets))


@asynccontextmanager
async def sending(settings: Settings, folder: Path, seed: int) -> AsyncIterator[Sent]:
    """Be a producer of events."""
    producer = AIOKafkaProducer(bootstrap_servers=settings.kafka_bootstrap_servers, enable_idempotence=True)
    await producer.start()
    try:
        yield Sent(settings, producer, folder, random.Random(seed))
    finally:
        await producer.stop()


def told_by(node: NodeProcess) -> list[dict[str, Any]]:
    """Return what the crashing node has told of itself."""
    lines = node.log.read_bytes().split(b"\n")[:-1]
    return [json.loads(line) for line in lines if line.startswith(b'{"event": "crash"')]


async def read_all(settings: Settings, name: str) -> list[Any]:
    """Return every committed record of a topic."""
    async with LogReader(settings, topic_name(settings, name), 0) as reader:
        return [record async for records in reader.read(0) for record in records]


async def assert_exact(road: Road, sent: Sent) -> None:
    """Every input has had its outcome, once; what was written beside the table was written for each of them."""

    async def is_sent_in_again() -> bool:
        return len(await read_all(road.settings, RETRY)) >= len(sent.outcomes["deferred"])

    # What is projected is committed, but the markers of that in the other topics may come a moment later.
    await road.until(is_sent_in_again)
    files = await road.fetch("SELECT uri, version, digest FROM files")
    history = await road.fetch("SELECT input_offset, outcome FROM file_history ORDER BY input_offset, outcome")
    letters = [dict(record.headers) for record in await read_all(road.settings, DEAD_LETTERS)]
    told = {
        reason: [int(h["dl-offset"]) for h in letters if h["dl-reason"] == reason]
        for reason in (b"undecodable", b"gave_up")
    }

    assert {row["uri"]: row["version"] for row in files} == sent.versions
    assert {row["uri"]: row["digest"] for row in files} == sent.digests
    expected = {offset: outcome for outcome, offsets in sent.outcomes.items() for offset in offsets}
    assert [(row["input_offset"], row["outcome"]) for row in history] == sorted(
        (offset, outcome) for offset, outcome in expected.items() if outcome != "rejected"
    )
    # The hasher sends at least once; its dead letters say which input they are.
    assert set(told[b"undecodable"]) == set(sent.outcomes["rejected"])
    assert sorted(told[b"gave_up"]) == sent.outcomes["gave_up"]
    assert len(await read_all(road.settings, RETRY)) == len(sent.outcomes["deferred"])
    verification = await verify(road.settings)
    assert all_faults(verification) == []
    assert {name: count for report in verification.partitions for name, count in report.outcomes.items() if count} == {
        outcome: len(offsets) for outcome, offsets in sent.outcomes.items()
    }


async def crash_at_every_point(
    road: Road, role: str, send_burst: Callable[[], Awaitable[None]], until_done: Callable[[], Awaitable[None]]
) -> None:
    """Kill the role at the first point of its batch, at the second, … until a batch has no more points.

    There is always more to do: a burst is sent before each kill. `until_done` then waits until all of it is.
    """
    started = time.monotonic()
    for _ in range(AHEAD):
        await send_burst()
    node = road.launch(
        "tests.chaos.crashing_node", role, BATCH_RECORDS_MAX=str(BURST), KAFKA_GROUP_INSTANCE_ID="crashing"
    )
    told: list[dict[str, Any]] = []
    while not any("survived" in line for line in told):
        known = len(told)
        await road.until(lambda: len(told_by(node)) > known)  # noqa: B023 - it is called before `known` changes
        told = told_by(node)
        for _ in range(len(told) - known):
            await send_burst()
    await until_done()

    killed = [line["killed"] for line in told if "killed" in line]
    assert [part for part in DECISIVE[role] if not any(part in name for name in killed)] == []
    print(f"{role}: killed at {len(killed)} points, {time.monotonic() - started:.0f} s")


@pytest.mark.parametrize("role", CHAIN)
async def test_a_crash_at_any_point_of_a_batch_changes_nothing(
    role: str, make_settings: MakeSettings, tmp_path: Path
) -> None:
    """Killed at the first point of its batch, at the second, … until a batch has no more points: exact."""
    settings = make_settings(kafka_topic_partitions=1, kafka_session_timeout_ms=1000, allowed_roots=(tmp_path,))
    await create_topics(settings)
    with ending(Road(settings, tmp_path)) as road:
        async with sending(settings, tmp_path, seed=7) as sent:
            road.start(*(other for other in CHAIN if other != role))
            await crash_at_every_point(road, role, sent.send_burst, lambda: road.until_visible([sent.last]))
        await assert_exact(road, sent)


@dataclass
class Deferred:
    """What was put into the retry topic, and what has to come of it."""

    settings: Settings
    producer: AIOKafkaProducer
    chance: random.Random
    bursts: int = 0
    #: By kind, the keys and values of what was sent, in order.
    sent: dict[str, list[tuple[bytes, bytes]]] = field(default_factory=dict)

    async def send_burst(self) -> None:
        """Send the next burst as the reducer would; its pause is one that only the longest bounds."""
        self.bursts += 1
        kinds = [*("garbage", "early") * 3, *["due"] * (BURST - 6)]
        self.chance.shuffle(kinds)
        futures = []
        for number, kind in enumerate(kinds):
            name = f"{self.bursts}-{number}"
            event = FileEvent(
                event_id=name,
                uri=f"file:///made/{self.chance.randrange(URIS)}.bin",
                op="modified",
                occurred_at=datetime.now(UTC),
                content=name.encode(),
                expected_version=1_000_000 if kind == "early" else None,
            )
            value = encode_event(event) if kind != "garbage" else f"no JSON at all: {name}".encode()
            self.sent.setdefault(kind, []).append((event.uri.encode(), value))
            # The second half of a burst is due when the clock of somebody else says so.
            due = b"9" * 14 if number >= BURST // 2 else b"0"
            headers = [(ATTEMPT_HEADER, b"1"), (DUE_HEADER, due)]
            topic = topic_name(self.settings, RETRY)
            futures.append(
                await self.producer.send(topic, value=value, key=event.uri.encode(), headers=headers, partition=0)
            )
        for future in futures:
            await future


async def test_a_crash_of_the_retry_role_at_any_point_of_a_batch_changes_nothing(
    make_settings: MakeSettings, tmp_path: Path
) -> None:
    """Every event comes in again exactly once per attempt, in order, and garbage is exactly one dead letter."""
    settings = make_settings(
        kafka_topic_partitions=1,
        kafka_session_timeout_ms=1000,
        retry_max_attempts=3,
        retry_backoff_base_ms=1,
        retry_backoff_cap_ms=40,
    )
    await create_topics(settings)
    with ending(Road(settings, tmp_path)) as road:
        async with sending(settings, tmp_path, seed=7) as other:
            deferred = Deferred(settings, other.producer, other.chance)
            road.start(*CHAIN)

            async def have_all_been_given_up() -> bool:
                rows = await road.fetch("SELECT count(*) AS n FROM file_history WHERE outcome = 'gave_up'")
                return bool(rows[0]["n"] >= len(deferred.sent["early"]))

            await crash_at_every_point(road, "retry", deferred.send_burst, lambda: road.until(have_all_been_given_up))
            inputs = await read_all(settings, FILE_EVENTS)
            await road.until_visible([Position(0, inputs[-1].offset)])
        await assert_sent_in_again(road, deferred)


async def assert_sent_in_again(road: Road, deferred: Deferred) -> None:
    """Everything came in once per attempt, and had its outcome."""
    inputs: dict[bytes, list[tuple[bytes, bytes]]] = {}
    for record in await read_all(road.settings, FILE_EVENTS):
        [(name, attempt)] = record.headers
        assert name == ATTEMPT_HEADER
        inputs.setdefault(attempt, []).append((record.key, record.value))
    letters = [(dict(r.headers)["dl-reason"], r.key, r.value) for r in await read_all(road.settings, DEAD_LETTERS)]
    early, due, garbage = (deferred.sent[kind] for kind in ("early", "due", "garbage"))
    history = await road.fetch("SELECT outcome, count(*) AS n FROM file_history GROUP BY outcome")

    assert [item for item in inputs[b"1"] if item in set(early)] == early
    assert [item for item in inputs[b"1"] if item not in set(early)] == due
    assert [inputs[b"2"], inputs[b"3"]] == [early, early]
    assert sorted(inputs) == [b"1", b"2", b"3"]
    assert [letter[1:] for letter in letters if letter[0] == b"invalid_retry"] == garbage
    assert [letter[1:] for letter in letters if letter[0] == b"gave_up"] == early
    assert {row["outcome"]: row["n"] for row in history} == {
        "committed": len(due),
        "deferred": 2 * len(early),
        "gave_up": len(early),
    }
    assert all_faults(await verify(road.settings)) == []
