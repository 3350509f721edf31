"""The walk of `pipeline.scan`: what it finds, what it leaves out, and the event it makes of a file."""

from __future__ import annotations

import asyncio
import os
import socket
import threading
from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path
from urllib.parse import unquote_to_bytes

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline import scan as module
from pipeline.client import Position
from pipeline.errors import InputRejected, StamplineError
from pipeline.events import URI_MAX_BYTES, FileEvent, decode_event, encode_event
from pipeline.kafka import partition_for
from pipeline.scan import Found, ScanResult, Skipped, event_for, file_uri, new_event_id, scan, walk

NOON = datetime(2026, 11, 23, 12, tzinfo=UTC)
ODD_NAMES = [
    b"with space",
    b"100%",
    b"%41",
    b"a#b",
    b"a?b=c",
    b"line\nbreak",
    b"back\\slash",
    "grün-文件".encode(),
    b"not-utf8-\xff\xfe",
    b"+plus",
    b"~tilde",
    b" ",
]
NAME = st.binary(min_size=1, max_size=60).filter(lambda name: b"\x00" not in name and b"/" not in name)


class Collector:
    """A producer that keeps what it is given; the real one passes `tests/integration` with the same scans."""

    def __init__(self, *, partitions: int = 4) -> None:
        self.events: list[FileEvent] = []
        self.calls: list[int] = []
        self._next = [0] * partitions

    async def send_all(self, events: Iterable[FileEvent]) -> list[Position]:
        """Append each event to its partition."""
        positions = []
        for event in events:
            partition = partition_for(event.uri.encode(), len(self._next))
            positions.append(Position(partition, self._next[partition]))
            self._next[partition] += 1
            self.events.append(event)
        self.calls.append(len(positions))
        return positions


def _found(root: Path) -> dict[str, int]:
    return {item.path: item.size for item in walk(root) if isinstance(item, Found)}


def _skipped(root: Path) -> dict[str, str]:
    return {Path(item.path).name: item.reason for item in walk(root) if isinstance(item, Skipped)}


@pytest.mark.unit
def test_walk_finds_every_regular_file_at_any_depth(tmp_path: Path) -> None:
    """Files at every level are found once, with their size; folders are not."""
    deep = tmp_path.joinpath(*["d"] * 40)
    deep.mkdir(parents=True)
    (deep / "leaf").write_bytes(b"12345")
    (tmp_path / "top").write_bytes(b"")
    (tmp_path / ".hidden").write_bytes(b"1")
    assert _found(tmp_path) == {str(deep / "leaf"): 5, str(tmp_path / "top"): 0, str(tmp_path / ".hidden"): 1}


@pytest.mark.unit
@pytest.mark.parametrize("name", ODD_NAMES)
def test_an_odd_name_survives_the_way_into_the_uri(tmp_path: Path, name: bytes) -> None:
    """The percent-decoded uri is the name in bytes, and the event is valid JSON that decodes to the same uri."""
    path = os.fsencode(tmp_path) + b"/" + name
    with open(path, "wb") as file:
        file.write(b"x")
    [found] = [item for item in walk(tmp_path) if isinstance(item, Found)]
    event = event_for(found, now=NOON)
    assert unquote_to_bytes(event.uri.removeprefix("file://")) == path
    assert event.uri == Path(os.fsdecode(path)).as_uri()
    assert decode_event(event.uri.encode(), encode_event(event)) == event


@pytest.mark.unit
@given(names=st.lists(NAME, min_size=1, max_size=4))
def test_file_uri_is_that_of_pathlib(names: list[bytes]) -> None:
    """For any name that the system allows, the uri is the one that `Path.as_uri` gives, and it is ASCII."""
    path = Path("/", *(os.fsdecode(name) for name in names))
    assert file_uri(str(path)) == path.as_uri()
    assert file_uri(str(path)).isascii()


@pytest.mark.unit
def test_symlinks_are_counted_and_not_followed(tmp_path: Path) -> None:
    """A symlink to a file, to a folder, to its own parent and to nowhere: all left out, and the walk ends."""
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "file").write_bytes(b"x")
    for name, target in {"file": "real/file", "folder": "real", "loop": ".", "dangling": "nowhere"}.items():
        (tmp_path / name).symlink_to(target)
    assert list(_found(tmp_path)) == [str(tmp_path / "real" / "file")]
    assert _skipped(tmp_path) == dict.fromkeys(("file", "folder", "loop", "dangling"), "symlink")


@pytest.mark.unit
def test_what_is_no_regular_file_is_counted(tmp_path: Path) -> None:
    """A pipe and a socket have no content to hash."""
    os.mkfifo(tmp_path / "pipe")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(os.path.relpath(tmp_path / "socket"))  # a socket's path may have 107 bytes only
    assert _found(tmp_path) == {}
    assert _skipped(tmp_path) == {"pipe": "not_regular", "socket": "not_regular"}


@pytest.mark.unit
def test_a_folder_that_may_not_be_read_is_counted_and_the_rest_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Permission denied on one folder does not end the scan. Denied by hand here: root may read everything."""
    for name in ("closed", "open"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_bytes(b"x")
    scandir = os.scandir

    def guarded(folder: str) -> object:
        if folder.endswith("closed"):
            raise PermissionError(13, "Permission denied", folder)
        return scandir(folder)

    monkeypatch.setattr(os, "scandir", guarded)
    assert list(_found(tmp_path)) == [str(tmp_path / "open" / "file")]
    assert _skipped(tmp_path) == {"closed": "unreadable"}


@pytest.mark.unit
def test_a_root_may_be_a_file_or_a_symlink(tmp_path: Path) -> None:
    """A root is resolved: the file has the same uri whichever way the scan came."""
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "file").write_bytes(b"x")
    (tmp_path / "alias").symlink_to("folder")
    expected = {str(tmp_path / "folder" / "file"): 1}
    assert _found(tmp_path / "folder" / "file") == expected
    assert _found(tmp_path / "alias") == expected
    assert _found(tmp_path / "alias" / "file") == expected


@pytest.mark.unit
def test_a_root_that_does_not_exist_is_an_error(tmp_path: Path) -> None:
    """The message names the path and the reason."""
    with pytest.raises(StamplineError, match=r"cannot scan '.*nothing': No such file or directory"):
        list(walk(tmp_path / "nothing"))


@pytest.mark.unit
def test_an_event_says_what_was_seen() -> None:
    """Op `created`, the time of observation, the size, the namespace and where it comes from."""
    event = event_for(Found("/data/a b", 7), "photos", now=NOON)
    assert (event.uri, event.op, event.occurred_at, event.size) == ("file:///data/a%20b", "created", NOON, 7)
    assert (event.namespace, event.source, event.content) == ("photos", "scan", None)
    before = datetime.now(UTC)
    assert before <= event_for(Found("/a", 0)).occurred_at <= datetime.now(UTC)


@pytest.mark.unit
def test_a_path_too_long_for_a_uri_is_refused() -> None:
    """The limit is on the encoded form: it may be three times as long as the path."""
    fits = "/" + "a" * (URI_MAX_BYTES - len("file:///"))
    assert len(event_for(Found(fits, 0)).uri) == URI_MAX_BYTES
    for path in (fits + "a", "/" + "é" * 700):
        with pytest.raises(InputRejected, match="uri_too_long"):
            event_for(Found(path, 0))


@pytest.mark.unit
def test_event_ids_are_unique_version_7_and_in_order_of_time() -> None:
    """Ids of one run never repeat, carry version and variant, and start with the time in milliseconds."""
    ids = [new_event_id() for _ in range(5000)]
    assert len(set(ids)) == len(ids)
    assert all(len(event_id) == 32 and event_id[12] == "7" and event_id[16] in "89ab" for event_id in ids)
    moments = [int(event_id[:12], 16) for event_id in ids]
    assert moments == sorted(moments)


@pytest.mark.unit
async def test_scan_sends_every_file_and_says_where_it_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files, bytes and skips are counted over several chunks; the offsets are those after the last event."""
    monkeypatch.setattr(module, "CHUNK_FILES_MAX", 10)
    for number in range(25):
        (tmp_path / f"file-{number}").write_bytes(b"x" * number)
    (tmp_path / "link").symlink_to("file-1")
    producer = Collector()
    seen: list[int] = []
    result = await scan([tmp_path], producer, namespace="n", on_progress=lambda so_far: seen.append(so_far.files))
    assert (result.files, result.bytes) == (25, sum(range(25)))
    assert (result.skipped, result.skipped_total) == ({"symlink": 1}, 1)
    assert sum(result.last_offsets.values()) == 25
    assert len(producer.calls) == 3
    assert seen == sorted(seen)
    assert seen[-1] == 25
    assert {event.namespace for event in producer.events} == {"n"}


@pytest.mark.unit
async def test_scan_walks_in_a_thread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The walk never blocks the loop."""
    (tmp_path / "file").write_bytes(b"x")
    threads: set[int] = set()
    scandir = os.scandir

    def watched(folder: str) -> object:
        threads.add(threading.get_ident())
        return scandir(folder)

    monkeypatch.setattr(os, "scandir", watched)
    await scan([tmp_path], Collector())
    assert threads
    assert threading.get_ident() not in threads


@pytest.mark.unit
async def test_a_failing_producer_ends_the_scan(tmp_path: Path) -> None:
    """The producer's error comes through, and no task is left behind."""

    class Broken:
        async def send_all(self, events: Iterable[FileEvent]) -> list[Position]:
            raise StamplineError("broken")

    (tmp_path / "file").write_bytes(b"x")
    before = asyncio.all_tasks()
    with pytest.raises(StamplineError, match="broken"):
        await scan([tmp_path], Broken())
    assert asyncio.all_tasks() == before


@pytest.mark.unit
async def test_a_scan_of_nothing_sends_nothing(tmp_path: Path) -> None:
    """An empty folder is a good scan."""
    assert await scan([tmp_path], Collector()) == ScanResult()
