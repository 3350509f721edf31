"""Stores of one partition: one contract, which both kinds keep, and what a crash leaves of the kind on disk."""

from __future__ import annotations

import random
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple

import pytest
from aiokafka.structs import ConsumerRecord
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.errors import RecoveryFailed
from pipeline.events import PROGRESS_KEY, Change, Progress, decode_change, encode_record
from tables.changelog import load
from tables.rocks import RocksFolder, RocksStore
from tables.store import Mark, MemoryStore, OpenStore, PartitionStore, open_in_memory

pytestmark = pytest.mark.unit

TOPIC = "stampline-reducer-files-changelog"
PLACE = ("files", TOPIC, 3)
NOON = datetime(2026, 11, 23, 12, tzinfo=UTC)


class Contents(NamedTuple):
    """All that a store holds."""

    values: dict[bytes, bytes]
    progress: Progress | None
    position: int
    mark: Mark | None


def contents(store: PartitionStore) -> Contents:
    """Return all that a store holds, each value read in both ways."""
    values = dict(store.items())

    assert {key: store.get(key) for key in values} == values
    return Contents(values, store.progress, store.position, store.mark)


def make_progress(next_input_offset: int) -> Progress:
    """Make the progress of a partition that committed every input."""
    return Progress(next_input_offset=next_input_offset, outcomes={"committed": next_input_offset})


@pytest.fixture(params=["memory", "rocksdb"])
def open_store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[OpenStore]:
    """How a store of one kind is opened."""
    if request.param == "memory":
        yield open_in_memory
    else:
        with RocksFolder(tmp_path / "tables") as folder:
            yield folder.open


@pytest.fixture
def store(open_store: OpenStore) -> Iterator[PartitionStore]:
    """An empty store of one kind."""
    store = open_store(*PLACE)
    yield store
    store.close()


def test_a_new_store_is_empty_and_stands_at_the_beginning(store: PartitionStore) -> None:
    """Nothing is known, not even that the partition ever began."""
    assert contents(store) == ({}, None, 0, None)
    assert (len(store), store.get(b"a"), store.get(PROGRESS_KEY)) == (0, None, None)


def test_a_batch_is_taken_over_as_a_whole(store: PartitionStore) -> None:
    """Values, progress and position move together; within a batch the last value of a key wins."""
    first, second = make_progress(3), make_progress(5)

    store.apply([(b"a", b"1"), (b"b", b"2"), (b"a", b"3")], first, 4, mark=Mark(3, b"first"))
    store.apply([(b"b", b"4")], second, 6)

    assert contents(store) == ({b"a": b"3", b"b": b"4"}, second, 6, Mark(3, b"first"))


def test_a_key_that_is_gone_is_not_there(store: PartitionStore) -> None:
    """A tombstone takes a key away; one that was never there is no fault."""
    store.apply([(b"a", b"1"), (b"b", b"2")], None, 2)
    store.apply([(b"c", b"3")], None, 5, gone=[b"a", b"never"])

    assert contents(store).values == {b"b": b"2", b"c": b"3"}
    assert store.get(b"a") is None


def test_a_changelog_that_shrinks_is_a_bug(store: PartitionStore) -> None:
    """Positions only go forward, and nothing of such a batch is taken."""
    store.apply([], make_progress(1), 5)
    with pytest.raises(AssertionError, match="only grows"):
        store.apply([(b"a", b"1")], make_progress(2), 4)
    assert contents(store) == ({}, make_progress(1), 5, None)


def test_all_keys_are_listed_however_many(store: PartitionStore) -> None:
    """More keys than are read at a time, in any order; keys of our own are not among them."""
    values = {b"file:///%d" % number: b"%d" % number for number in range(2500)} | {
        b"\x01": b"low",
        b"\xff" * 9: b"high",
    }

    store.apply(values.items(), make_progress(9), 2503)

    assert dict(store.items()) == values
    assert len(store) == len(values)


def test_closing_twice_does_no_harm(store: PartitionStore) -> None:
    """A lane that is ended while it closes may do so."""
    store.close()
    store.close()


@dataclass
class Log:
    """A changelog in the making, and what a store must hold at each offset where a piece of it may end."""

    records: list[ConsumerRecord[bytes, bytes]] = field(default_factory=list)
    values: dict[bytes, bytes] = field(default_factory=dict)
    progress: Progress | None = None
    inputs: int = 0

    def append(self, key: bytes, value: bytes | None) -> None:
        """Add a record."""
        self.records.append(ConsumerRecord(TOPIC, 3, len(self.records), 0, 0, key, value, None, 0, 0, ()))

    def write(self, batch: Sequence[tuple[bytes, bool]]) -> None:
        """Write one batch of the reducer: its changes or tombstones, and its progress."""
        for key, gone in batch:
            if gone:
                self.append(key, None)
                self.values.pop(key, None)
                continue
            value = encode_record(Change(outcome="rejected", input_offset=self.inputs, recorded_at=NOON, state=None))
            self.inputs += 1
            self.append(key, value)
            self.values[key] = value
        self.progress = Progress(next_input_offset=self.inputs, outcomes={"rejected": self.inputs})
        self.append(PROGRESS_KEY, encode_record(self.progress))


BATCHES = st.lists(
    st.lists(st.tuples(st.sampled_from([b"a", b"b", b"c", b"d"]), st.booleans()), max_size=4), min_size=1, max_size=8
)


@contextmanager
def crashed(path: Path, *, cut_bytes: int = 0) -> Iterator[RocksStore]:
    """Open what a process that is killed now would leave; `cut_bytes` of the end of RocksDB's log are lost too."""
    with tempfile.TemporaryDirectory() as folder:
        image = Path(folder, "tables")
        shutil.copytree(path, image)
        newest = max((image / "files" / "3").glob("*.log"), key=lambda file: int(file.stem))
        with newest.open("r+b") as log:
            log.truncate(max(0, newest.stat().st_size - cut_bytes))
        with RocksFolder(image) as again:
            store = again.open(*PLACE)
            yield store
            store.close()


@settings(max_examples=25)
@given(batches=BATCHES, seed=st.integers(0, 2**32))
def test_whatever_a_crash_leaves_is_the_fold_of_the_changelog_up_to_its_position(
    batches: list[list[tuple[bytes, bool]]], seed: int
) -> None:
    """Pieces of any length are loaded; killed between any two, the store opens with all of them, and goes on."""
    chance = random.Random(seed)
    log, memory = Log(), MemoryStore()
    for batch in batches:
        log.write(batch)
    with tempfile.TemporaryDirectory() as folder, RocksFolder(Path(folder, "tables")) as rocks:
        store = rocks.open(*PLACE)
        while store.position < len(log.records):
            until = chance.randint(store.position + 1, len(log.records))
            for target in (store, memory):
                load(target, log.records[target.position : until], until)
            with crashed(rocks.path) as left:
                assert contents(left) == contents(memory)
                load(left, log.records[left.position :], len(log.records))
                assert (dict(left.items()), left.progress) == (log.values, log.progress)
            if chance.random() < 0.3:
                store.close()
                store = rocks.open(*PLACE)
        assert contents(store) == contents(memory)
        store.close()


@settings(max_examples=25)
@given(batches=BATCHES, share=st.floats(0, 1))
def test_a_log_that_is_cut_off_anywhere_leaves_whole_batches(
    batches: list[list[tuple[bytes, bool]]], share: float
) -> None:
    """After a power loss the store is the fold up to an earlier batch, and the difference brings it up to date."""
    log = Log()
    at = {0: Contents({}, None, 0, None)}
    with tempfile.TemporaryDirectory() as folder, RocksFolder(Path(folder, "tables")) as rocks:
        store = rocks.open(*PLACE)
        for batch in batches:
            log.write(batch)
            load(store, log.records[store.position :], len(log.records))
            at[store.position] = contents(store)
        [newest] = (rocks.path / "files" / "3").glob("*.log")
        with crashed(rocks.path, cut_bytes=int(share * newest.stat().st_size)) as left:
            assert contents(left) == at[left.position]
            load(left, log.records[left.position :], len(log.records))
            assert contents(left) == contents(store)
        store.close()


def poison(key: bytes | None, value: bytes | None) -> ConsumerRecord[bytes, bytes]:
    """Make a record that no reducer writes, at offset 2."""
    return ConsumerRecord(TOPIC, 3, 2, 0, 0, key, value, None, 0, 0, ())


GOOD = encode_record(Change(outcome="rejected", input_offset=0, recorded_at=NOON, state=None))


@pytest.mark.parametrize(
    ("record", "why"),
    [
        (poison(b"file:///a", b"\xff garbage"), "is no change"),
        (poison(b"file:///a", b""), "is no change"),
        (poison(b"file:///a", GOOD[:-1]), "is no change"),
        (poison(b"file:///a", GOOD.replace(b"rejected", b"vanished")), "is no change .*vanished"),
        (poison(b"file:///a", GOOD.replace(b"rejected", b"\xffejected")), "is no change"),
        (poison(b"file:///a", encode_record(make_progress(1))), "is no change"),
        (poison(None, GOOD), "it has no key"),
        (poison(b"", GOOD), "it has no key"),
        (poison(None, None), "it has no key"),
        (poison(b"\x00store", GOOD), "begins with NUL"),
        (poison(b"\x00store", None), "begins with NUL"),
        (poison(b"\xff\xfe", GOOD), "utf-8"),
        (poison(PROGRESS_KEY, None), "is no progress record .it has no value"),
        (poison(PROGRESS_KEY, b""), "is no progress record"),
        (poison(PROGRESS_KEY, GOOD), "is no progress record"),
    ],
)
def test_a_record_that_nobody_of_ours_writes_is_named_and_nothing_is_taken(
    store: PartitionStore, record: ConsumerRecord[bytes, bytes], why: str
) -> None:
    """The store stays before the piece with that record: no hole, and nothing of what is behind it."""
    log = Log()
    log.write([(b"a", False)])
    load(store, log.records, 2)
    before = contents(store)
    log.append(b"never", GOOD)

    with pytest.raises(RecoveryFailed, match=rf"{TOPIC} partition 3 offset 2 .*{why}.*newer version"):
        load(store, [record, log.records[-1]], 4)

    assert contents(store) == before


@given(key=st.none() | st.just(PROGRESS_KEY) | st.binary(max_size=8), value=st.none() | st.binary(max_size=40))
def test_no_bytes_pass_that_cannot_be_read_later(key: bytes | None, value: bytes | None) -> None:
    """Whatever is in the topic is either taken, and readable, or refused by name; nothing else ever happens."""
    store = MemoryStore()
    try:
        load(store, [poison(key, value)], 3)
    except RecoveryFailed:
        assert store == MemoryStore()
    else:
        assert store.position == 3
        assert all(decode_change(taken).outcome for _, taken in store.items())


def test_a_record_with_fields_of_a_newer_version_is_taken(store: PartitionStore) -> None:
    """Fields are only ever added at the end, so a node that is not upgraded yet can read what the others write."""
    value = encode_record(["rejected", 0, NOON, None, None, None, "why", "a field from the future"])

    load(store, [poison(b"file:///a", value)], 3)

    assert store.get(b"file:///a") == value
