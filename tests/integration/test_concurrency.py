"""Optimistic concurrency and deduplication, end to end: what an event expects, and what becomes of it."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Callable
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path
from typing import Any, Final

import aiohttp
import pytest
import pytest_asyncio
from aiokafka import AIOKafkaProducer
from prometheus_client.parser import text_string_to_metric_families

from agents.retry import DUE_HEADER
from pipeline.client import Position
from pipeline.events import ATTEMPT_HEADER, FileEvent
from pipeline.kafka import partition_for
from pipeline.logreader import LogReader
from pipeline.status import read_status
from pipeline.topics import DEAD_LETTERS, FILE_EVENTS, RETRY, create_topics, topic_name
from pipeline.worker import ROLES, run_node
from tests.fix_road import DEADLINE_SECONDS, Road, ending
from tests.fix_services import MakeSettings, SharedServices

pytestmark = pytest.mark.integration

URI: Final = "file:///made/a.bin"
#: Every pause before an event is sent in again, in ms: with the least and the longest alike there is nothing to draw.
BACKOFF_MS: Final = 300

Row = tuple[str, str, int | None, str | None]


@pytest_asyncio.fixture
async def road(
    make_settings: MakeSettings, tmp_path: Path, request: pytest.FixtureRequest, services: SharedServices
) -> AsyncIterator[Road]:
    """A deployment of one partition with its topics made, with the settings that the test asks for."""
    if services.kind == "embedded":
        pytest.skip("exactly once is a promise of brokers with transactions")
    settings = make_settings(kafka_topic_partitions=1, **getattr(request, "param", {}))
    await create_topics(settings)
    with ending(Road(settings, tmp_path)) as running:
        yield running


def with_settings(**overrides: int) -> pytest.MarkDecorator:
    """Run a test with these settings."""
    return pytest.mark.parametrize("road", [overrides], indirect=True, ids=[""])


class Sender:
    """Sends events about one file."""

    def __init__(self, road: Road) -> None:
        self._road = road
        self._sent = 0

    async def __call__(
        self, event_id: str, expected_version: int | None = None, content: bytes | None = None
    ) -> Position:
        """Send one event, with a content of its own if none is given."""
        self._sent += 1
        event = FileEvent(
            event_id=event_id,
            uri=URI,
            op="modified",
            occurred_at=datetime.now(UTC),
            expected_version=expected_version,
            content=content if content is not None else b"%d" % self._sent,
        )
        [position] = await self._road.send([event])
        return position


async def read_history(road: Road) -> list[Row]:
    """Return what became of each input, in the order of the inputs."""
    rows = await road.fetch("SELECT event_id, outcome, version, reason FROM file_history ORDER BY input_offset")
    return [(row["event_id"], row["outcome"], row["version"], row["reason"]) for row in rows]


async def until_history(road: Road, condition: Callable[[list[Row]], bool]) -> list[Row]:
    """Wait until the history fulfils a condition, and return it."""

    async def fulfilled() -> bool:
        return condition(await read_history(road))

    await road.until(fulfilled)
    return await read_history(road)


async def read_topic(road: Road, name: str) -> list[Any]:
    """Return every committed record of a topic."""
    async with LogReader(road.settings, topic_name(road.settings, name), 0) as reader:
        return [record async for records in reader.read(0) for record in records]


def assert_verified(road: Road) -> None:
    """`stampline verify` ends with 0."""
    done = road.launch("pipeline", "verify")

    assert done.process.wait(DEADLINE_SECONDS) == 0, done.log.read_text()


async def test_what_is_expected_is_committed_and_what_is_past_is_a_conflict(road: Road) -> None:
    """The version that an event expects is compared with the file's; the history says what it really was."""
    road.start(*ROLES)
    send = Sender(road)
    await send("new", 0)
    await send("next", 1)
    await send("late", 1)
    await send("very-late", 0)
    last = await send("after-all", 2)
    await road.until_visible([last])
    [row] = await road.fetch("SELECT version, event_id FROM files")

    assert await read_history(road) == [
        ("new", "committed", 1, None),
        ("next", "committed", 2, None),
        ("late", "conflict", 2, "expected version 1, is 2"),
        ("very-late", "conflict", 2, "expected version 0, is 2"),
        ("after-all", "committed", 3, None),
    ]
    assert (row["version"], row["event_id"]) == (3, "after-all")
    assert_verified(road)


@with_settings(retry_max_attempts=100, retry_backoff_base_ms=BACKOFF_MS, retry_backoff_cap_ms=BACKOFF_MS)
async def test_what_is_early_is_committed_once_its_version_has_come(road: Road) -> None:
    """It is deferred and sent in again by the retry role, after the backoff each time, until it is its turn.

    Then nothing is behind: the marker of the retry role's last transaction is no event that is still to come.
    """
    road.start(*ROLES)
    send = Sender(road)
    await send("early", 2)
    await until_history(road, lambda rows: len(rows) >= 2)
    await send("first")
    await send("second")
    history = await until_history(road, lambda rows: ("early", "committed", 3, None) in rows)
    early = [(outcome, reason) for event_id, outcome, _, reason in history if event_id == "early"]
    times = await road.fetch("SELECT recorded_at FROM file_history WHERE event_id = 'early' ORDER BY input_offset")
    pauses_ms = [
        (after["recorded_at"] - before["recorded_at"]).total_seconds() * 1000 for before, after in pairwise(times)
    ]
    attempts = [dict(record.headers).get(ATTEMPT_HEADER) for record in await read_topic(road, FILE_EVENTS)]

    assert early[0] == ("deferred", "expected version 2, is 0")
    assert {outcome for outcome, _ in early[:-1]} == {"deferred"}
    assert min(pauses_ms) >= BACKOFF_MS
    assert [number for number in attempts if number] == [b"%d" % number for number in range(1, len(early))]
    assert len(history) == len(early) + 2
    assert [partition.behind for partition in (await read_status(road.settings)).partitions] == [0]
    assert_verified(road)


@with_settings(retry_max_attempts=3, retry_backoff_base_ms=1, retry_backoff_cap_ms=20)
async def test_what_never_comes_is_given_up(road: Road) -> None:
    """After RETRY_MAX_ATTEMPTS it is a dead letter with the bytes that the producer sent, and it is not sent again."""
    original = f' {{"uri": "{URI}", "op":"deleted","event_id":"never", "x": [1, 2],'.encode()
    original += b'"occurred_at":"2026-11-23T09:00:00Z",  "expected_version":7}'
    road.start(*ROLES)
    await road.send_raw(URI.encode(), original, partition=partition_for(URI.encode(), 1))
    await until_history(road, lambda rows: "gave_up" in {outcome for _, outcome, _, _ in rows})
    last = await Sender(road)("after")
    await road.until_visible([last])
    [letter] = await read_topic(road, DEAD_LETTERS)
    told = dict(letter.headers)
    inputs = await read_topic(road, FILE_EVENTS)

    reason = "expected version 7, is 0"
    assert await read_history(road) == [
        *[("never", "deferred", None, reason)] * 3,
        ("never", "gave_up", None, reason),
        ("after", "committed", 1, None),
    ]
    assert [(r.key, r.value) for r in inputs[:-1]] == [(URI.encode(), original)] * 4
    assert [[value for name, value in record.headers] for record in inputs[:-1]] == [[], [b"1"], [b"2"], [b"3"]]
    assert (letter.key, letter.value) == (URI.encode(), original)
    assert (told["dl-reason"], told["dl-attempts"], told["dl-offset"]) == (
        b"gave_up",
        b"4",
        b"%d" % inputs[3].offset,
    )
    assert len(await read_topic(road, RETRY)) == 3
    assert_verified(road)


@with_settings(dedup_event_ids_max=2)
async def test_a_repeated_event_is_a_duplicate_as_long_as_it_is_among_the_last(road: Road) -> None:
    """A producer's retry changes nothing; DEDUP_EVENT_IDS_MAX ids are remembered for each file."""
    road.start(*ROLES)
    send = Sender(road)
    for event_id in ("a", "a", "b", "a", "c", "b"):
        await send(event_id)
    last = await send("a")
    await road.until_visible([last])

    assert [(event_id, outcome) for event_id, outcome, _, _ in await read_history(road)] == [
        ("a", "committed"),
        ("a", "duplicate"),
        ("b", "committed"),
        ("a", "duplicate"),
        ("c", "committed"),
        ("b", "duplicate"),
        ("a", "committed"),  # forgotten: b and c came after it
    ]
    assert [dict(row) for row in await road.fetch("SELECT version FROM files")] == [{"version": 4}]
    assert_verified(road)


@with_settings(dedup_window_seconds=2)
async def test_a_repeated_event_is_a_duplicate_as_long_as_the_window(road: Road) -> None:
    """An id is forgotten DEDUP_WINDOW_SECONDS after it was stamped."""
    road.start(*ROLES)
    send = Sender(road)
    await send("a")
    repeat = await send("a")
    await road.until_visible([repeat])
    [row] = await road.fetch("SELECT stamped_at FROM files")
    forgotten_at = row["stamped_at"].timestamp() + road.settings.dedup_window_seconds
    await road.until(lambda: time.time() > forgotten_at)
    last = await send("a")
    await road.until_visible([last])

    assert [(outcome, version) for _, outcome, version, _ in await read_history(road)] == [
        ("committed", 1),
        ("duplicate", 1),
        ("committed", 2),
    ]
    assert_verified(road)


@with_settings(retry_max_attempts=2, retry_backoff_base_ms=1, retry_backoff_cap_ms=20)
async def test_what_was_early_and_repeated_is_applied_once(road: Road) -> None:
    """A producer's retry of an event that was deferred is deferred too; one of them is applied, no more."""
    road.start("hasher", "reducer", "projector")
    send = Sender(road)
    content = b"the same"
    await send("early", 1, content)
    last = await send("early", 1, content)
    await road.until_visible([last])
    last = await send("first")
    await road.until_visible([last])
    road.start("retry")
    history = await until_history(road, lambda rows: len(rows) >= 5)

    assert [(event_id, outcome) for event_id, outcome, _, _ in history] == [
        ("early", "deferred"),
        ("early", "deferred"),
        ("first", "committed"),
        ("early", "committed"),
        ("early", "duplicate"),
    ]
    assert_verified(road)


async def test_garbage_in_the_retry_topic_is_a_dead_letter(road: Road) -> None:
    """Somebody else's record stops nothing: it is kept with the reason, and what comes after it is sent in."""
    event = f'{{"uri":"{URI}","op":"deleted","event_id":"e","occurred_at":"2026-11-23T09:00:00Z"}}'.encode()
    far = [(DUE_HEADER, b"9" * 14), ("trace", b"t")]
    retry = road.start("retry")
    async with AIOKafkaProducer(bootstrap_servers=road.settings.kafka_bootstrap_servers) as producer:
        for key, value, headers in ((None, b"no JSON", []), (URI.encode(), None, far), (URI.encode(), event, far)):
            topic = topic_name(road.settings, RETRY)
            await producer.send_and_wait(topic, key=key, value=value, headers=headers, partition=0)

    async def is_sent() -> bool:
        return bool(await read_topic(road, FILE_EVENTS))

    await road.until(is_sent)
    letters = await read_topic(road, DEAD_LETTERS)
    [sent] = await read_topic(road, FILE_EVENTS)

    assert [(r.key, r.value, dict(r.headers)["dl-reason"]) for r in letters] == [
        (None, b"no JSON", b"invalid_retry"),
        (URI.encode(), None, b"invalid_retry"),
    ]
    assert (sent.key, sent.value, sent.headers) == (URI.encode(), event, (("trace", b"t"),))
    assert retry.terminate() == 0


async def test_a_node_tells_prometheus_what_it_did(road: Road) -> None:
    """`/metrics` of its web view holds the counters of all its roles, and they add up."""
    send = Sender(road)
    async with run_node(road.settings, ROLES, transactions=True) as node, aiohttp.ClientSession() as session:
        for expected_version in (0, 1, 0):
            last = await send(f"{expected_version}-{time.monotonic_ns()}", expected_version)
        await road.until_visible([last])
        async with session.get(f"{node.web}/metrics") as response:
            text = await response.text()
    counted = {
        (sample.name, sample.labels.get("outcome") or sample.labels.get("role")): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }

    assert counted["reducer_outcomes_total", "committed"] == 2
    assert counted["reducer_outcomes_total", "conflict"] == 1
    assert counted["action_dedup_checks_total", None] == 3
    assert counted["canonical_store_state_commits_total", None] == 2
    assert counted["batch_duration_seconds_count", "reducer"] >= 1
    assert counted["canonical_store_commit_latency_ms_count", None] >= 1
