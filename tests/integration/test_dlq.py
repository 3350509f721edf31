"""`stampline dlq`: letters are found, sent in again once and no more, or dropped, and the topic remembers it."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from base64 import b64decode
from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from aiokafka import AIOKafkaProducer
from aiokafka.errors import KafkaError

from pipeline import replays
from pipeline.errors import ServiceUnavailable, StamplineError
from pipeline.letters import Filters, FoundLetter, LetterShelf
from pipeline.logreader import LogReader
from pipeline.postgres import PostgresConnectionManager
from pipeline.records import LetterId, Record, dead_letter_of_event
from pipeline.replays import Acted, Action, Done, LetterDesk
from pipeline.scan import file_uri
from pipeline.topics import has_transactions
from pipeline.verify import all_faults, verify
from tests.fix_road import DEADLINE_SECONDS, NodeProcess, Road, environment
from tests.fix_services import SharedServices

pytestmark = pytest.mark.integration

STATUSES = 'SELECT "offset", status FROM dead_letters ORDER BY topic, "partition", "offset"'
ALL = 'SELECT * FROM stampline.dead_letters ORDER BY topic, "partition", "offset"'


def dlq(road: Road, *arguments: str, answer: str | None = None) -> subprocess.CompletedProcess[str]:
    """Run `stampline dlq` to its end."""
    return subprocess.run(
        [sys.executable, "-m", "pipeline", "dlq", *arguments],
        cwd=Path(__file__).parents[2],
        env=environment(road.settings) | {"COLUMNS": "300"},
        input=answer or "",
        capture_output=True,
        text=True,
        timeout=DEADLINE_SECONDS,
        check=False,
    )


def make_event(uri: str, **fields: object) -> bytes:
    """Make a file event as a producer would."""
    told = {"event_id": f"id of {uri}", "uri": uri, "op": "created", "occurred_at": "2026-11-23T09:00:00Z"}
    return json.dumps(told | fields).encode()


@dataclass
class Mail:
    """Letters that are put into the topic of dead letters by hand, and the projector that shows them."""

    road: Road
    transactions: bool
    manager: PostgresConnectionManager
    projectors: list[NodeProcess] = field(default_factory=list)

    @property
    def prefix(self) -> str:
        """What the topics of this test begin with."""
        return self.road.settings.kafka_topic_prefix

    async def post(self, *originals: Record, topic: str = "file-events", reason: str = "content_missing") -> None:
        """Put a letter of each original into partition 3; the offsets of the originals count from 0."""
        letters = [
            dead_letter_of_event(
                original,
                topic=self.prefix + topic,
                partition=3,
                offset=offset,
                reason=reason,
                error="[/red] it is \x1b[31mgone",
                attempts=1,
                now=datetime(2026, 11, 23, 9, offset, tzinfo=UTC),
            )
            for offset, original in enumerate(originals)
        ]
        await self.send("file-events-dlq", *letters)

    async def send(self, topic: str, *records: Record) -> None:
        """Send records to partition 3."""
        producer = AIOKafkaProducer(bootstrap_servers=self.road.settings.kafka_bootstrap_servers)
        await producer.start()
        try:
            for key, value, headers in records:
                await producer.send_and_wait(
                    self.prefix + topic, key=key, value=value, headers=list(headers), partition=3
                )
        finally:
            await producer.stop()

    async def show(self, *statuses: tuple[int, str]) -> None:
        """Start a projector, wait until it shows these letters and nothing else, and stop it."""
        projector = self.road.start("projector")
        await self.road.until(lambda: self.shows(*statuses))
        assert projector.terminate() == 0

    async def shows(self, *statuses: tuple[int, str]) -> bool:
        """Tell whether these letters are shown and nothing else."""
        return [tuple(row) for row in await self.road.fetch(STATUSES)] == list(statuses)

    async def read(self, topic: str) -> list[Any]:
        """Read all that is committed in partition 3."""
        async with LogReader(self.road.settings, self.prefix + topic, 3) as reader:
            return [record async for records in reader.read(0) for record in records]

    def desk(self, action: Action, *, force: bool = False) -> LetterDesk:
        """Return a desk of its own, as each operator has one."""
        return LetterDesk(self.road.settings, self.shelf, action, force=force)

    @property
    def shelf(self) -> LetterShelf:
        """The letters."""
        return LetterShelf(self.road.settings, self.manager)

    async def found(self) -> list[FoundLetter]:
        """Return all letters."""
        return await self.shelf.find(Filters(), 100, newest=False)


@pytest.fixture
async def mail(road: Road) -> AsyncIterator[Mail]:
    """A deployment without a node."""
    async with PostgresConnectionManager(road.settings) as manager:
        yield Mail(road, await has_transactions(road.settings), manager)


def make_originals(count: int) -> list[Record]:
    """Make events of files that are not there."""
    return [Record(b"file:///%d" % number, b"%d" % number, [("h", b"\xff")]) for number in range(count)]


async def all_done(desk: LetterDesk, letters: Sequence[FoundLetter]) -> list[Done]:
    """Act on letters to the end."""
    async with aclosing(desk.act(letters)) as doing:
        return [done async for done in doing]


async def test_an_event_whose_fault_is_gone_is_sent_in_again(road: Road, tmp_path: Path) -> None:
    """It becomes a version, its letter is marked, and the topic alone tells both; one that fails again is a letter of
    its own that names the first.
    """
    files = {name: file_uri(str(tmp_path / name)) for name in ("back", "gone")}
    road.start("hasher", "reducer")
    projector = road.start("projector")
    for uri in files.values():
        await road.send_raw(uri.encode(), make_event(uri), partition=3)

    async def letters() -> dict[int, str]:
        return {row["offset"]: row["status"] for row in await road.fetch(STATUSES)}

    async def shown(*statuses: str) -> bool:
        return list((await letters()).values()) == list(statuses)

    await road.until(lambda: shown("open", "open"))
    back, gone = [f"file-events:3:{offset}" for offset in await letters()]
    (tmp_path / "back").write_bytes(b"here I am")
    done = await asyncio.to_thread(dlq, road, "replay", back, gone, "--yes", "--json")

    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    prefix = road.settings.kafka_topic_prefix
    assert [(item["letter"], item["token"][:14]) for item in answer["letters"]] == [
        (prefix + back, "file-events:3:"),
        (prefix + gone, "file-events:3:"),
    ]
    await road.until(lambda: shown("replayed", "replayed", "open"))
    again = list(await letters())[-1]
    assert f"file-events:3:{again}" == answer["letters"][1]["token"]
    [row] = await road.fetch("SELECT uri, version, digest FROM files")
    assert (row["uri"], row["version"]) == (files["back"], 1)
    [named] = await road.fetch('SELECT headers FROM dead_letters WHERE "offset" = $1', again)
    assert json.loads(named["headers"]) == [{"name": "dl-replay-of", "value": prefix + gone}]
    assert all_faults(await verify(road.settings)) == []

    before = await road.fetch(ALL)
    assert projector.terminate() == 0
    await road.fetch("TRUNCATE stampline.dead_letters")
    await road.fetch("DELETE FROM stampline.watermarks WHERE projection = 'dead_letters'")
    road.start("projector")
    await road.until(lambda: shown("replayed", "replayed", "open"))
    assert await road.fetch(ALL) == before


async def test_a_letter_is_sent_in_once(mail: Mail) -> None:
    """Also while PostgreSQL does not know of the first time yet: the marks in the topic count. Force is force."""
    await mail.post(*make_originals(3))
    await mail.show((0, "open"), (1, "open"), (2, "open"))
    first = dlq(mail.road, "replay", "file-events:3:1", "--yes")
    second = dlq(mail.road, "replay", "file-events:3:1", "--yes")
    rest = dlq(mail.road, "replay", "--all", "--yes")
    nothing = dlq(mail.road, "replay", "--all", "--yes")
    dropping = dlq(mail.road, "drop", "file-events:3:1", "--yes")

    assert (first.returncode, first.stdout) == (0, f"{mail.prefix}file-events:3:1\tfile-events:3:0\n")
    assert (second.returncode, second.stdout, len(second.stderr.splitlines())) == (1, "", 1)
    assert f"{mail.prefix}file-events:3:1: it was replayed before; --force does it all the same" in second.stderr
    assert (rest.returncode, len(rest.stdout.splitlines())) == (0, 2)
    assert "2 sent in again\nleft out: " in rest.stderr
    assert (nothing.returncode, dropping.returncode) == (1, 1)
    assert [record.value for record in await mail.read("file-events")] == [b"1", b"0", b"2"]

    forced = dlq(mail.road, "replay", "file-events:3:1", "--force", "--yes")
    assert forced.returncode == 0
    [*_, event] = await mail.read("file-events")
    assert (event.key, event.value) == (b"file:///1", b"1")
    assert event.headers == (("h", b"\xff"), ("dl-replay-of", f"{mail.prefix}file-events:3:1".encode()))
    assert dlq(mail.road, "drop", "file-events:3:2", "--force", "--yes").returncode == 0
    await mail.show((0, "replayed"), (1, "replayed"), (2, "dropped"))


async def test_dropping_sends_nothing(mail: Mail) -> None:
    """A dry run changes nothing at all, and an operator who does not say yes has changed nothing either."""
    await mail.post(*make_originals(3))
    await mail.show((0, "open"), (1, "open"), (2, "open"))
    before = await mail.read("file-events-dlq")
    dry = dlq(mail.road, "drop", "--all", "--dry-run")
    no = dlq(mail.road, "drop", "--all", answer="n\n")
    assert (dry.returncode, len(dry.stdout.splitlines()), dry.stderr) == (0, 3, "3 would be dropped\n")
    assert (no.returncode, no.stdout) == (130, "")
    assert "Drop 3 dead letters?" in no.stderr
    assert len(await mail.read("file-events-dlq")) == len(before)

    done = dlq(mail.road, "drop", "--all", "--until", "2026-11-23T09:02:00Z", answer="y\n")
    assert (done.returncode, done.stdout.splitlines()) == (0, [f"{mail.prefix}file-events:3:{n}" for n in (0, 1)])
    await mail.show((0, "dropped"), (1, "dropped"), (2, "open"))
    assert await mail.read("file-events") == []


async def test_what_cannot_be_sent_in_again_says_what_to_do(mail: Mail) -> None:
    """A change that PostgreSQL refused, a foreign record, a mark alone, a topic that is none of ours: they can only be
    dropped. What was named by its address is done as a whole or not at all; `--all` leaves them out.
    """
    await mail.post(Record(b"a", b"x"), topic="stampline-reducer-files-changelog", reason="projection_refused")
    await mail.post(Record(b"a", b"x"), topic="payments")
    await mail.post(*make_originals(1))
    await mail.send("file-events-dlq", Record(b"a", b"who am I?"))
    projector = mail.road.start("projector")
    await mail.road.until(lambda: has_letters(mail, 4))
    assert projector.terminate() == 0
    foreign = next(letter.id for letter in await mail.found() if letter.reason == "foreign")
    changelog = "stampline-reducer-files-changelog:3:0"
    tried = {
        changelog: dlq(mail.road, "replay", changelog, "file-events:3:0", "--yes"),
        "payments:3:0": dlq(mail.road, "replay", "payments:3:0", "--yes"),
        str(foreign): dlq(mail.road, "replay", str(foreign), "--yes"),
    }
    said = {
        changelog: "projections rebuild",
        "payments:3:0": "no topic that events come in by",
        str(foreign): "drop it",
    }
    for letter, done in tried.items():
        assert (done.returncode, done.stdout, len(done.stderr.splitlines())) == (1, "", 1), done.stderr
        assert said[letter] in done.stderr
    assert await mail.read("file-events") == []

    done = dlq(mail.road, "replay", "--all", "--yes", "--json")
    answer = json.loads(done.stdout)
    assert (done.returncode, len(answer["letters"]), len(answer["refused"])) == (0, 1, 3)
    assert dlq(mail.road, "drop", *tried, "--yes").returncode == 0
    projector = mail.road.start("projector")

    async def none_open() -> bool:
        return await mail.shelf.find(Filters(status="open"), 1, newest=True) == []

    await mail.road.until(none_open)


async def has_letters(mail: Mail, count: int) -> bool:
    """Tell whether so many letters are shown."""
    return len(await mail.found()) == count


async def test_letters_are_listed_and_shown(mail: Mail) -> None:
    """By reason, topic, time and status, the newest first; what is in them does nothing to a terminal."""
    text = Record(b"file:///\x1b[2J", '{"é": "\x1b[31m"}\n'.encode(), [("h", b"\xff"), ("t", b"[/b]")])
    await mail.post(text, Record(None, b"\x00\xffbinary"), Record(b"k", None))
    await mail.show((0, "open"), (1, "open"), (2, "open"))
    table = dlq(mail.road, "list")
    assert (table.returncode, "\x1b" in table.stdout, "\\x1b[31mgone" in table.stdout) == (0, False, True)

    def listed(*options: str) -> list[int]:
        return [
            int(item["letter"].split(":")[2]) for item in json.loads(dlq(mail.road, "list", "--json", *options).stdout)
        ]

    assert listed() == [2, 1, 0]
    assert listed("--limit", "1") == [2]
    assert listed("--reason", "too_large") == listed("--status", "replayed") == listed("--topic", "payments") == []
    assert listed("--topic", "file-events", "--since", "2026-11-23T09:01:00", "--until", "2026-11-23T11:02+02:00") == [
        1
    ]
    assert listed("--status", "all", "--since", "2026-11-23", "--topic", f"{mail.prefix}file-events") == [2, 1, 0]

    shown = [dlq(mail.road, "show", f"file-events:3:{number}").stdout for number in range(3)]
    assert '{"é": "\\x1b[31m"}' in shown[0]
    assert "header:    h = base64 /w==" in shown[0]
    assert "00 ff 62 69 6e 61 72 79" in shown[1]
    assert ("payload:   none" in shown[2], "\x1b" in "".join(shown)) == (True, False)
    full = json.loads(dlq(mail.road, "show", "file-events:3:0", "--json").stdout)
    assert (b64decode(full["payload_base64"]), b64decode(full["key_base64"])) == (text.value, text.key)
    assert full["headers"] == [{"name": "h", "base64": "/w=="}, {"name": "t", "value": "[/b]"}]


async def test_what_is_not_there_is_said_in_a_line(mail: Mail) -> None:
    """An unknown letter and filters that leave nothing have exit code 1; an empty list is no failure."""
    cases = {
        ("show", "file-events:3:0"): (1, "stampline: there is no dead letter file-events:3:0"),
        ("drop", "file-events:3:0", "--yes"): (1, "stampline: there is no dead letter file-events:3:0"),
        ("replay", "--all", "--yes"): (1, "stampline: there is no such dead letter"),
        ("list",): (0, "no dead letters"),
    }
    for arguments, (code, text) in cases.items():
        done = dlq(mail.road, *arguments)
        assert (done.returncode, done.stdout, len(done.stderr.splitlines())) == (code, "", 1), done.stderr
        assert done.stderr.startswith(text)
    assert json.loads(dlq(mail.road, "list", "--json").stdout) == []


async def test_an_aborted_replay_leaves_neither_event_nor_mark(
    mail: Mail, monkeypatch: pytest.MonkeyPatch, services: SharedServices
) -> None:
    """Whatever fails before the commit: nobody sees anything of it, and the same command then does all of it."""
    if services.kind == "embedded":
        pytest.skip("the embedded broker has no transactions")
    await mail.post(*make_originals(2))
    await mail.show((0, "open"), (1, "open"))

    async def fail(_producer: AIOKafkaProducer) -> None:
        raise KafkaError

    with monkeypatch.context() as patch:
        patch.setattr(AIOKafkaProducer, "commit_transaction", fail)
        with pytest.raises(ServiceUnavailable):
            await all_done(mail.desk("replay"), await mail.found())
    assert (await mail.read("file-events"), len(await mail.read("file-events-dlq"))) == ([], 2)
    assert await mail.desk("replay").judge(await mail.found()) == []

    [done] = await all_done(mail.desk("replay"), await mail.found())
    assert (len(done.acted), len(await mail.read("file-events"))) == (2, 2)


async def test_of_two_operators_the_later_one_goes_on(
    mail: Mail, monkeypatch: pytest.MonkeyPatch, services: SharedServices
) -> None:
    """The one before is fenced; what it had done is known to the other, who does the rest. Nothing is sent in twice."""
    if services.kind == "embedded":
        pytest.skip("the embedded broker has no transactions")
    monkeypatch.setattr(replays, "_LETTERS_MAX", 1)
    await mail.post(*make_originals(4))
    await mail.show(*((number, "open") for number in range(4)))
    letters = await mail.found()
    async with aclosing(mail.desk("replay").act(letters)) as first:
        assert [item.letter.offset for item in (await anext(first)).acted] == [0]
        second = await all_done(mail.desk("replay"), letters)
        with pytest.raises(StamplineError, match="somebody else has begun to act on dead letters"):
            await anext(first)

    acted: list[Acted] = [item for done in second for item in done.acted]
    assert [item.letter.offset for item in acted] == [1, 2, 3]
    assert [refusal.letter for done in second for refusal in done.refused] == [
        LetterId(f"{mail.prefix}file-events", 3, 0)
    ]
    assert [record.value for record in await mail.read("file-events")] == [b"0", b"1", b"2", b"3"]
