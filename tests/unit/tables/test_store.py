"""The store of a table: all its partitions as Faust sees them. Those themselves: `test_partition_stores.py`."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from faust.types import TP

from agents import reducer
from pipeline.app import RoleApp
from pipeline.events import Change, FileState, Progress, encode_record
from pipeline.settings import Settings
from tables.kinds import stores
from tables.store import BatchStore, BatchTable, release

pytestmark = pytest.mark.unit

NOON = datetime(2026, 11, 23, 12, 0, 0, 123_000, tzinfo=UTC)
KEY = b"file:///data/\xc3\xbc.bin"


def make_value(version: int = 1, **fields: Any) -> bytes:
    """Make the changelog value of a committed change."""
    defaults: dict[str, Any] = {
        "digest": bytes(range(32)),
        "size": 5,
        "op": "created",
        "deleted": False,
        "namespace": "default",
        "occurred_at": NOON,
        "stamped_at": NOON,
        "event_id": "e1",
        "workflow_id": None,
        "metadata": b'{"k":[1,null]}',
        "input_offset": 7,
        "recent": "e1\x001795435200123\x00",
    }
    state = FileState(version=version, **(defaults | fields))
    return encode_record(Change(outcome="committed", input_offset=7, recorded_at=NOON, state=state))


#: What a rejected input leaves behind whose uri was never known here.
STATELESS = encode_record(Change(outcome="rejected", input_offset=9, recorded_at=NOON, state=None, reason="wrong_key"))


@pytest.fixture(params=["memory", "rocksdb"])
def table(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[BatchTable]:
    """A table as the reducer makes it, in a Faust app that was not started, with stores of each kind."""
    role = reducer.Reducer(Settings(), transactions=True)
    app = RoleApp(reducer.APP_ID, Settings(), role, transactions=True)
    table = BatchTable(app, name=reducer.TABLE, key_type=bytes, value_type=bytes, partitions=8)
    app.tables.add(table)
    with stores(Settings(table_store=request.param, table_dir=tmp_path / "tables")) as open_store:
        table.batch_store.open_partition = partial(open_store, reducer.TABLE, "changelog")
        role.store = table.batch_store
        yield table
        table.batch_store.retain(())


@pytest.fixture
def store(table: BatchTable) -> BatchStore:
    """Its store, with two partitions that hold one file each."""
    for number, key in enumerate([KEY, b"file:///b"]):
        progress = Progress(next_input_offset=8, outcomes={"committed": 1})
        table.batch_store.partition(number).apply([(key, make_value())], progress, 2)
    return table.batch_store


def test_only_the_partitions_that_stay_are_kept(store: BatchStore) -> None:
    """One that stays is not touched; one that comes back later begins empty, or with what is on disk."""
    gone, kept = store.partition(0), store.partition(1)

    store.retain([1, 5])

    assert store.partitions == {1: kept}
    assert store.partition(1) is kept
    assert store.partition(0) is not gone
    assert dict(store.partition(0).items()) == ({KEY: make_value()} if gone.on_disk else {})


async def test_a_partition_that_is_released_is_not_lost(store: BatchStore) -> None:
    """What is in memory stays as it is, and what is on disk is opened again, at the same position."""
    before = dict(store.items())

    for _ in range(2):
        await release(store, 0)

    assert [store.partition(number).position for number in (0, 1)] == [2, 2]
    assert dict(store.items()) == before


def test_faust_sees_states_as_people_read_them(table: BatchTable, store: BatchStore) -> None:
    """The digest is hex, times are text, metadata is JSON: Faust's web view can send it as it is."""
    shown = json.loads(json.dumps(table[KEY]))

    assert shown == {
        "version": 1,
        "digest": bytes(range(32)).hex(),
        "size": 5,
        "op": "created",
        "deleted": False,
        "namespace": "default",
        "occurred_at": "2026-11-23T12:00:00.123000Z",
        "stamped_at": "2026-11-23T12:00:00.123000Z",
        "event_id": "e1",
        "workflow_id": None,
        "metadata": {"k": [1, None]},
        "input_offset": 7,
        "recent": [["e1", 1_795_435_200_123]],
    }


def test_a_key_can_be_asked_for_as_text(store: BatchStore) -> None:
    """The web view has keys as text; a uri is its UTF-8."""
    assert store[KEY.decode()] == store[KEY]
    assert KEY.decode() in store
    assert "file:///elsewhere" not in store
    with pytest.raises(KeyError):
        store["file:///elsewhere"]


def test_all_partitions_are_one_mapping(store: BatchStore) -> None:
    """Keys, values, items and length span the partitions of this process."""
    assert sorted(store.keys()) == ["file:///b", KEY.decode()]
    assert [value["version"] for value in store.values()] == [1, 1]
    assert {key for key, _ in store.items()} == set(store)
    assert len(store) == 2


def test_a_deleted_file_has_no_digest(store: BatchStore) -> None:
    """What is not there is null, not an empty text."""
    value = make_value(2, digest=None, size=None, deleted=True, metadata=None)
    store.partition(0).apply([(KEY, value)], Progress(next_input_offset=9, outcomes={}), 4)

    shown = store[KEY]

    assert (shown["digest"], shown["size"], shown["metadata"], shown["deleted"]) == (None, None, None, True)


def test_a_rejected_input_with_the_wrong_key_hides_no_file(store: BatchStore) -> None:
    """Its uri may belong to another partition; the file's own state is shown, wherever the other record lies."""
    for number in (0, 1):
        other = store.partition(1 - number)
        key = [KEY, b"file:///b"][number]
        other.apply([(key, STATELESS)], Progress(next_input_offset=9, outcomes={}), 4)

    assert [store[KEY]["version"], store["file:///b"]["version"]] == [1, 1]


@pytest.mark.parametrize(
    "write",
    [
        lambda store: store.__setitem__(KEY, b"x"),
        lambda store: store.__delitem__(KEY),
        lambda store: store.clear(),
        lambda store: store.pop(KEY),
        lambda store: store.setdefault("file:///new", b"x"),
        lambda store: store.apply_changelog_batch([], bytes, bytes),
        lambda store: store.restore_backup(TP("t", 0), 1),
    ],
    ids=["set", "delete", "clear", "pop", "setdefault", "changelog", "backup"],
)
def test_nobody_writes_key_by_key(store: BatchStore, write: Callable[[Any], Any]) -> None:
    """Faust's own ways to write are refused, and leave everything as it was."""
    before = dict(store.partition(0).items())

    with pytest.raises(TypeError, match="only through its reducer"):
        write(store)

    assert dict(store.partition(0).items()) == before


def test_a_table_refuses_writes_too(table: BatchTable, store: BatchStore) -> None:
    """An agent that writes to the table is a bug that is told at once."""
    with pytest.raises((TypeError, RuntimeError)):
        table[KEY] = b"x"
    assert store[KEY]["version"] == 1


async def test_faust_leaves_recovery_and_standbys_alone(store: BatchStore) -> None:
    """It is told that nothing is on disk and that no standby is needed."""
    tp = TP("stampline-reducer-files-changelog", 0)
    store.set_persisted_offset(tp, 5)

    assert store.persisted_offset(tp) is None  # type: ignore[func-returns-value] # that is the answer
    assert not await store.need_active_standby_for(tp)


def test_a_reset_forgets_everything(store: BatchStore) -> None:
    """Faust resets stores when a node starts afresh."""
    store.reset_state()
    assert (len(store), store.partitions) == (0, {})
