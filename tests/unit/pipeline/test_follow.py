"""Following a folder: the events between two walks say exactly what changed, and nothing else."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.client import Position
from pipeline.errors import StamplineError
from pipeline.events import FileEvent
from pipeline.follow import _look, compare, follow, still_there
from pipeline.scan import CHUNK_FILES_MAX, Found, Skipped, file_uri

pytestmark = pytest.mark.unit


class FakeSink:
    """Keeps what is sent to it."""

    def __init__(self) -> None:
        self.calls: list[list[FileEvent]] = []

    async def send_all(self, events: Iterable[FileEvent]) -> list[Position]:
        """Take the events."""
        self.calls.append(list(events))
        return [Position(0, number) for number, _ in enumerate(self.calls[-1])]

    @property
    def told(self) -> list[tuple[str, str]]:
        """The op and the file name of each event, in order."""
        return [(event.op, event.uri.rsplit("/", 1)[1]) for call in self.calls for event in call]


def walks(files: dict[str, int]) -> dict[str, Found]:
    """Make what a walk sees from names and sizes."""
    return {f"/data/{name}": Found(f"/data/{name}", size) for name, size in files.items()}


def told(known: dict[str, int], seen: dict[str, int]) -> set[tuple[str, str, int | None]]:
    """Return op, uri and size of each event between two walks."""
    return {(event.op, event.uri, event.size) for event in compare(walks(known), walks(seen))}


def test_what_came_changed_and_went_is_told() -> None:
    """One event each; what stayed as it was needs none."""
    events = told({"same": 1, "grown": 2, "gone": 3}, {"same": 1, "grown": 5, "new": 0})

    assert events == {
        ("modified", "file:///data/grown", 5),
        ("created", "file:///data/new", 0),
        ("deleted", "file:///data/gone", None),
    }


def test_the_first_walk_tells_everything() -> None:
    """Nothing is known yet, and an empty folder has nothing to tell."""
    assert told({}, {"a": 1, "b": 2}) == {("created", "file:///data/a", 1), ("created", "file:///data/b", 2)}
    assert told({}, {}) == set()


#: Names as the system hands them over: any bytes, those that are no UTF-8 as surrogates.
_NAMES = st.binary(min_size=1, max_size=3).filter(lambda name: not {0, ord("/")} & set(name)).map(os.fsdecode)
_FILES = st.dictionaries(_NAMES, st.integers(0, 3))


@given(_FILES, _FILES)
def test_the_events_lead_from_what_was_known_to_what_is_seen(known: dict[str, int], seen: dict[str, int]) -> None:
    """Applied to the one they give the other; names that are no UTF-8 included."""
    before, after = walks(known), walks(seen)
    sizes: dict[str, int | None] = {file_uri(path): found.size for path, found in before.items()}

    events = compare(before, after)
    for event in events:
        assert (event.op == "created") == (event.uri not in sizes)
        if event.op == "deleted":
            del sizes[event.uri]
        else:
            sizes[event.uri] = event.size

    assert sizes == {file_uri(path): found.size for path, found in after.items()}
    assert len({event.uri for event in events}) == len(events)
    assert len({event.event_id for event in events}) == len(events)


@given(_FILES)
def test_what_did_not_change_is_not_told(files: dict[str, int]) -> None:
    """Two equal walks have no events between them."""
    assert compare(walks(files), walks(files)) == []


@pytest.mark.parametrize("way", ["written over", "replaced"])
def test_a_change_that_keeps_the_size_is_noticed(tmp_path: Path, way: str) -> None:
    """Time and inode tell, where the size does not."""
    path = tmp_path / "a.bin"
    path.write_bytes(b"old")
    status = path.stat()
    known = _look(tmp_path, {})

    if way == "written over":
        path.write_bytes(b"new")
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    else:
        (tmp_path / "other").write_bytes(b"new")
        os.utime(tmp_path / "other", ns=(status.st_atime_ns, status.st_mtime_ns))
        (tmp_path / "other").rename(path)

    assert [event.op for event in compare(known, _look(tmp_path, {}))] == ["modified"]


def test_a_folder_that_cannot_be_read_for_a_moment_is_not_gone(tmp_path: Path) -> None:
    """What was known below it stays known; only a walk that sees the folder may say that a file has gone."""
    (tmp_path / "kept").write_bytes(b"1")
    known = {str(tmp_path / name): Found(str(tmp_path / name), 1) for name in ("folder/a", "folder/b/c", "folderless")}

    assert set(_look(tmp_path, known)) == {str(tmp_path / "kept")}
    assert set(still_there([Skipped(str(tmp_path / "folder"), "unreadable")], known)) == {
        str(tmp_path / "folder/a"),
        str(tmp_path / "folder/b/c"),
    }


async def test_a_folder_is_followed_until_cancelled(tmp_path: Path) -> None:
    """Everything at first, then each change as a later walk sees it."""
    sink = FakeSink()
    (tmp_path / "a").write_bytes(b"1")
    task = asyncio.create_task(follow(tmp_path, sink, pause_seconds=0))

    async def told_of(op: str, name: str) -> None:
        async with asyncio.timeout(10):
            while (op, name) not in sink.told:  # noqa: ASYNC110 (a walk ends without a sign)
                await asyncio.sleep(0)

    await told_of("created", "a")
    (tmp_path / "b").touch()
    await told_of("created", "b")
    (tmp_path / "a").write_bytes(b"12")
    await told_of("modified", "a")
    (tmp_path / "b").unlink()
    await told_of("deleted", "b")
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task

    # A file that is cut before it is written may be seen in between.
    assert [event for event in sink.told if event != ("modified", "a")] == [
        ("created", "a"),
        ("created", "b"),
        ("deleted", "b"),
    ]


async def test_many_events_are_sent_in_pieces(tmp_path: Path) -> None:
    """A producer gets no more at once than it can hold."""
    sink = FakeSink()
    for number in range(CHUNK_FILES_MAX + 1):
        (tmp_path / str(number)).touch()
    task = asyncio.create_task(follow(tmp_path, sink))
    async with asyncio.timeout(10):
        while len(sink.told) <= CHUNK_FILES_MAX:  # noqa: ASYNC110 (the walk ends without a sign)
            await asyncio.sleep(0)
    task.cancel()

    assert [len(call) for call in sink.calls] == [CHUNK_FILES_MAX, 1]
    assert len(set(sink.told)) == CHUNK_FILES_MAX + 1


async def test_a_folder_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    """Following nothing would look like success."""
    with pytest.raises(StamplineError, match="cannot scan"):
        await follow(tmp_path / "missing", FakeSink())
