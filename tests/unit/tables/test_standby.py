"""Copies of other nodes' partitions: one writer for each store, faults told once, reads that never see them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Any, Self

import pytest
from structlog.testing import capture_logs

from agents import reducer
from pipeline.app import RoleApp
from pipeline.errors import RecoveryFailed, ServiceUnavailable
from pipeline.settings import Settings
from tables import standby
from tables.standby import Standbys
from tables.store import BatchStore, BatchTable, MemoryStore, PartitionStore
from tests.lane_fakes import failing, nothing, until, waiting
from tests.unit.tables.test_store import KEY, make_value

pytestmark = pytest.mark.unit


class FakeLog:
    """A changelog that is restored and followed as a test says; it does what `restore` and `LogReader` do."""

    def __init__(self) -> None:
        #: Done in order, one at each restore.
        self.restoring: list[Callable[[], Awaitable[None]]] = []
        #: Done when a reader is let go of.
        self.leaving: Callable[[], Awaitable[None]] = nothing
        self.restores = 0
        self.followers = 0
        self.end = 0
        self.position = 0

    async def restore(
        self, _settings: Settings, _topic: str, _partition: int, store: PartitionStore, *, report: Any
    ) -> int:
        """Bring the store to the end."""
        self.restores += 1
        report(0, 1)
        if self.restoring:
            await self.restoring.pop(0)()
        count, self.position = self.end - store.position, self.end
        store.apply([], None, self.end)
        return count

    def open(self, *_place: Any, wait_ms: int) -> Self:
        """Be the reader."""
        return self

    async def __aenter__(self) -> Self:
        self.followers += 1
        return self

    async def __aexit__(self, *_exc: object) -> None:
        await self.leaving()
        self.followers -= 1

    async def follow(self, start: int, _most: int) -> AsyncIterator[Sequence[Any]]:
        """Yield nothing but positions."""
        self.position = start
        while True:
            await asyncio.sleep(0)
            self.position = self.end
            yield ()


@pytest.fixture
def changelog(monkeypatch: pytest.MonkeyPatch) -> FakeLog:
    """A changelog in place of Kafka's, and pauses that a test can wait for."""
    fake = FakeLog()
    monkeypatch.setattr(standby, "restore", fake.restore)
    monkeypatch.setattr(standby, "LogReader", fake.open)
    monkeypatch.setattr(standby, "_BACKOFF_BASE_SECONDS", 0.0005)
    monkeypatch.setattr(standby, "_BACKOFF_CAP_SECONDS", 0.002)
    return fake


@pytest.fixture
def stores() -> BatchStore:
    """The store of a table, in memory."""
    app = RoleApp("standby", Settings(), reducer.Reducer(Settings(), transactions=True), transactions=True)
    return BatchTable(app, name="t", key_type=bytes, value_type=bytes, partitions=8).batch_store


@pytest.fixture
async def standbys() -> AsyncIterator[Standbys]:
    """Copies that end with the test."""
    standbys = Standbys(Settings(revoke_timeout_ms=50), "changelog")
    yield standbys
    await standbys.unfollow()
    await standbys.hand_over(0)


async def test_a_copy_follows_its_changelog(changelog: FakeLog, stores: BatchStore, standbys: Standbys) -> None:
    """It is restored, then kept up to date; its status says how far behind it is; `unfollow` ends it."""
    changelog.end = 5
    with capture_logs() as logs:
        standbys.follow(stores, {0})
        assert standbys.status() == {0: "opening"}
        await until(lambda: standbys.status() == {0: "following, 0 records behind"})
        changelog.end = 9
        await until(lambda: stores.partition(0).position == 9)
        await standbys.unfollow()

    assert (changelog.followers, standbys.status()) == (0, {})
    [line] = logs
    assert (line["event"], line["partition"], line["records"]) == ("standby_following", 0, 5)
    changelog.end = 11
    await asyncio.sleep(0.01)
    assert stores.partition(0).position == 9


async def test_a_fault_is_told_once_and_tried_again(changelog: FakeLog, stores: BatchStore, standbys: Standbys) -> None:
    """Whatever it is; another one is told too, and a bug with its traceback."""
    faults = [ServiceUnavailable("away"), ServiceUnavailable("away"), RecoveryFailed("bad"), KeyError("bug")]
    changelog.restoring = [failing(fault) for fault in [*faults, asyncio.CancelledError()]]
    with capture_logs() as logs:
        standbys.follow(stores, {0})
        await until(lambda: changelog.followers)

    assert changelog.restores == 6
    assert [line.get("error") for line in logs] == [
        "away", "bad", "KeyError: 'bug'", "something inside it was cancelled", None
    ]  # fmt: skip
    assert [line.get("exc_info") is not None for line in logs] == [False, False, True, False, False]


async def test_a_store_has_one_writer(changelog: FakeLog, stores: BatchStore, standbys: Standbys) -> None:
    """A task that does not end within the bound holds up no rebalance, but whoever wants its store next."""
    gate = asyncio.Event()
    changelog.leaving = waiting(gate)
    standbys.follow(stores, {0})
    await until(lambda: changelog.followers)

    async with asyncio.timeout(5):
        await standbys.unfollow()
    standbys.follow(stores, {0, 1})
    await until(lambda: changelog.followers == 2)
    assert standbys.status()[0] == "opening"
    opening = asyncio.create_task(standbys.hand_over(0))
    await asyncio.sleep(0.01)
    assert not opening.done()
    assert changelog.restores == 2
    gate.set()
    await opening

    assert changelog.followers == 1
    assert list(standbys.status()) == [1]


async def test_what_is_not_stood_by_for_any_more_is_not_followed(
    changelog: FakeLog, stores: BatchStore, standbys: Standbys
) -> None:
    """A new assignment replaces the one before, also where nobody said `unfollow` between."""
    standbys.follow(stores, {0, 1})
    await until(lambda: changelog.followers == 2)
    standbys.follow(stores, {1})
    await until(lambda: changelog.followers == 1)
    assert list(standbys.status()) == [1]


async def test_a_copy_that_failed_opens_its_files_again(
    changelog: FakeLog, stores: BatchStore, standbys: Standbys
) -> None:
    """A person may have deleted them meanwhile; what is in memory stays."""
    opened: list[MemoryStore] = []

    class DiskStore(MemoryStore):
        on_disk = True

    def open_partition(_number: int) -> PartitionStore:
        opened.append(DiskStore())
        return opened[-1]

    stores.open_partition = open_partition
    changelog.restoring = [failing(RecoveryFailed("damaged"))]
    with capture_logs():
        standbys.follow(stores, {0})
        await until(lambda: changelog.followers)

    assert len(opened) == 2
    assert stores.partition(0) is opened[1]


async def test_nobody_is_answered_from_a_copy(changelog: FakeLog, stores: BatchStore, standbys: Standbys) -> None:
    """It may be behind; once the partition is this node's, it answers."""
    stores.partition(0).apply([(KEY, make_value())], None, 1)
    stores.partition(1).apply([(b"file:///b", make_value())], None, 1)
    changelog.end = 1
    standbys.follow(stores, {0})

    assert KEY not in stores
    assert (list(stores.keys()), len(stores)) == (["file:///b"], 1)
    with pytest.raises(KeyError):
        stores[KEY]

    await standbys.unfollow()
    assert KEY not in stores
    standbys.follow(stores, set())
    assert stores[KEY]["version"] == 1
    assert len(stores) == 2
