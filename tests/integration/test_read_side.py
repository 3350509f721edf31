"""A hundred thousand events of every kind become exactly the rows that a plain recomputation says they must become."""

from __future__ import annotations

import random
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Final, NamedTuple

import pytest
from aiokafka import AIOKafkaProducer
from blake3 import blake3

from pipeline.client import EventProducer, Position
from pipeline.events import FileEvent
from pipeline.settings import Settings
from pipeline.topics import FILE_EVENTS, topic_name
from pipeline.verify import all_faults, verify
from tests.fix_road import Road

pytestmark = pytest.mark.integration

EVENTS: Final = 100_000
URIS: Final = 5_000
#: So many contents are shared by all files, so that there are duplicates.
CONTENTS: Final = 20_000
ATTEMPTS_MAX: Final = 2
#: A version that no file comes to.
NEVER: Final = 10**6
_CHUNK: Final = 4_000


class Garbage(NamedTuple):
    """A record that is no event."""

    partition: int
    value: bytes


@dataclass
class Made:
    """What is sent, in order, and what each event must become: its outcome, and its version where it has one."""

    items: list[FileEvent | Garbage] = field(default_factory=list)
    expected: list[tuple[str, int | None]] = field(default_factory=list)
    versions: Counter[str] = field(default_factory=Counter)
    contents: dict[str, bytes | None] = field(default_factory=dict)

    def add(self, event: FileEvent, outcome: str) -> None:
        """Add an event with the outcome that it must have."""
        if outcome == "committed":
            self.versions[event.uri] += 1
            self.contents[event.uri] = event.content if event.op != "deleted" else None
        self.items.append(event)
        self.expected.append((outcome, self.versions[event.uri] or None))


def make(seed: int) -> Made:
    """Make 5 % duplicates, conflicts and events from the future, 2 % deletions, 1 % garbage, and changes."""
    chance = random.Random(seed)
    now = datetime.now(UTC)
    made = Made()
    newest: dict[str, FileEvent] = {}
    for number in range(EVENTS):
        uri = f"file:///made/{chance.randrange(URIS)}.bin"
        kind = chance.choices(["duplicate", "conflict", "future", "deleted", "garbage", "change"], [5, 5, 5, 2, 1, 82])
        content = chance.randrange(CONTENTS).to_bytes(8, "big")
        event = FileEvent(event_id=f"{number:032x}", uri=uri, op="modified", occurred_at=now, content=content)
        match kind:
            case ["garbage"]:
                made.items.append(Garbage(chance.randrange(4), b"\xff{" + content))
                made.expected.append(("rejected", None))
            case ["duplicate"] if uri in newest:
                made.add(newest[uri], "duplicate")
            case ["conflict"] if uri in newest:
                made.add(_expecting(event, made.versions[uri] - 1), "conflict")
            case ["future"]:
                made.add(_expecting(event, NEVER), "deferred")
            case ["deleted"] if made.contents.get(uri) is not None:
                newest[uri] = FileEvent(event_id=event.event_id, uri=uri, op="deleted", occurred_at=now)
                made.add(newest[uri], "committed")
            case _:
                newest[uri] = event
                made.add(event, "unchanged" if made.contents.get(uri) == content else "committed")
    return made


def _expecting(event: FileEvent, version: int) -> FileEvent:
    return FileEvent(
        event_id=event.event_id,
        uri=event.uri,
        op=event.op,
        occurred_at=event.occurred_at,
        content=event.content,
        expected_version=version,
    )


async def send(settings: Settings, items: Sequence[FileEvent | Garbage]) -> list[Position]:
    """Send everything in order and return where each stands."""
    positions: list[Position] = []
    raw = AIOKafkaProducer(bootstrap_servers=settings.kafka_bootstrap_servers)
    await raw.start()
    try:
        async with EventProducer(settings) as producer:
            for start in range(0, len(items), _CHUNK):
                chunk = items[start : start + _CHUNK]
                # The order between garbage and events means nothing: garbage has no uri.
                sent = iter(await producer.send_all([item for item in chunk if isinstance(item, FileEvent)]))
                thrown = iter([await _throw(raw, settings, item) for item in chunk if isinstance(item, Garbage)])
                positions += [next(sent if isinstance(item, FileEvent) else thrown) for item in chunk]
    finally:
        await raw.stop()
    return positions


async def _throw(raw: AIOKafkaProducer, settings: Settings, item: Garbage) -> Position:
    told = await raw.send_and_wait(topic_name(settings, FILE_EVENTS), item.value, partition=item.partition)
    return Position(told.partition, told.offset)


@pytest.mark.timeout(400)
async def test_what_was_sent_is_what_is_shown(road: Road) -> None:
    """Row by row: files, history, contents, duplicates, activity and dead letters; and `verify` finds nothing."""
    road.settings = road.settings.model_copy(update={"retry_max_attempts": ATTEMPTS_MAX})
    made = make(seed=51)
    road.start("hasher", "retry")
    road.start("reducer")
    road.start("projector")
    positions = await send(road.settings, made.items)
    gave_up = sum(outcome == "deferred" for outcome, _ in made.expected)

    async def all_is_shown() -> bool:
        [row] = await road.fetch("SELECT count(*) FROM dead_letters WHERE reason = 'gave_up'")
        return bool(row["count"] == gave_up)

    await road.until_visible(positions)
    await road.until(all_is_shown)

    await check_history(road, made, positions)
    await check_contents(road, made)
    await check_activity(road, made, gave_up)
    await check_dead_letters(road, made, positions, gave_up)
    assert all_faults(await verify(road.settings)) == []


async def check_history(road: Road, made: Made, positions: Sequence[Position]) -> None:
    """Compare what is shown of each input, and what its file is in the end."""
    files = {row["uri"]: row for row in await road.fetch("SELECT uri, version, digest, deleted FROM files")}
    rows = await road.fetch("SELECT input_partition, input_offset, event_id, outcome, version FROM file_history")
    history = {(row["input_partition"], row["input_offset"]): row for row in rows}
    wanted = {
        (position.partition, position.offset): (item.event_id, outcome, version)
        for position, item, (outcome, version) in zip(positions, made.items, made.expected, strict=True)
        if isinstance(item, FileEvent)
    }
    shown = {place: (row["event_id"], row["outcome"], row["version"]) for place, row in history.items()}

    assert {uri: row["version"] for uri, row in files.items()} == dict(made.versions)
    assert {uri: row["digest"] for uri, row in files.items()} == {
        uri: _digest(content) for uri, content in made.contents.items()
    }
    assert {uri for uri, row in files.items() if row["deleted"]} == {
        uri for uri, content in made.contents.items() if content is None
    }
    assert len(history) == len(rows)
    assert {place: shown[place] for place in wanted} == wanted
    # What is there besides are the events from the future, sent in again.
    assert {row["outcome"] for place, row in history.items() if place not in wanted} == {"deferred", "gave_up"}


async def check_contents(road: Road, made: Made) -> None:
    """Compare the copies of each content, and what is wasted."""
    uris: dict[str, list[str]] = defaultdict(list)
    for uri, content in made.contents.items():
        if content is not None:
            uris[blake3(content).hexdigest()].append(uri)
    contents = {row["digest"]: row for row in await road.fetch("SELECT * FROM contents")}
    duplicates = {row["digest"]: row for row in await road.fetch("SELECT * FROM duplicates")}

    assert {digest: row["copies"] for digest, row in contents.items() if row["copies"]} == {
        digest: len(copies) for digest, copies in uris.items()
    }
    assert all((row["size"], row["bytes"]) == (8, 8 * row["copies"]) for row in contents.values())
    assert {digest: (row["copies"], row["wasted_bytes"]) for digest, row in duplicates.items()} == {
        digest: (len(copies), 8 * (len(copies) - 1)) for digest, copies in uris.items() if len(copies) > 1
    }
    for digest, row in duplicates.items():
        assert len(row["uris"]) == min(10, len(uris[digest]))
        assert set(row["uris"]) <= set(uris[digest])


async def check_activity(road: Road, made: Made, gave_up: int) -> None:
    """Compare the counts by op and outcome; an event from the future is one more input for each attempt."""
    wanted: Counter[tuple[str, str]] = Counter()
    for item, (outcome, _) in zip(made.items, made.expected, strict=True):
        if isinstance(item, FileEvent):
            wanted[item.op, outcome] += 1
    wanted["modified", "deferred"] += (ATTEMPTS_MAX - 1) * gave_up
    wanted["modified", "gave_up"] += gave_up
    shown: Counter[tuple[str, str]] = Counter()
    for row in await road.fetch("SELECT * FROM activity"):
        outcomes = ("committed", "unchanged", "duplicate", "conflict", "deferred", "gave_up", "rejected")
        shown.update({(row["op"], outcome): row[outcome] for outcome in outcomes if row[outcome]})
        assert row["namespace"] == "default"
        assert row["events"] == sum(row[outcome] for outcome in outcomes)

    assert shown == wanted


async def check_dead_letters(road: Road, made: Made, positions: Sequence[Position], gave_up: int) -> None:
    """Compare what was given up with what was garbage and what came from the future, byte by byte."""
    letters = await road.fetch("SELECT * FROM dead_letters")
    garbage = {
        (position.partition, position.offset): item.value
        for position, item in zip(positions, made.items, strict=True)
        if isinstance(item, Garbage)
    }

    assert {letter["topic"] for letter in letters} == {topic_name(road.settings, FILE_EVENTS)}
    assert garbage == {
        (letter["partition"], letter["offset"]): letter["payload"]
        for letter in letters
        if letter["reason"] == "undecodable"
    }
    assert len(letters) == len(garbage) + gave_up
    assert all(letter["attempts"] == ATTEMPTS_MAX + 1 for letter in letters if letter["reason"] == "gave_up")


def _digest(content: bytes | None) -> str | None:
    return None if content is None else blake3(content).hexdigest()
