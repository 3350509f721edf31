"""Stores on disk: what holds over a reopen, whose folder it is, and what is said when the disk or the files are bad."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from rocksdict import Options, Rdict
from structlog.testing import capture_logs

from pipeline.errors import RecoveryFailed, ServiceUnavailable, SettingsError
from pipeline.events import PROGRESS_KEY, Progress
from pipeline.settings import Settings
from tables.kinds import stores
from tables.rocks import CACHE_BYTES, WRITE_BUFFERS_BYTES, RocksFolder, RocksStore, _encode_header, _Header
from tables.store import Mark

pytestmark = pytest.mark.unit

PLACE = ("files", "changelog", 3)
PROGRESS = Progress(next_input_offset=7, outcomes={"committed": 7})
VALUES = {b"file:///%d" % number: b"%d" % number * 50 for number in range(3000)}


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[RocksFolder]:
    """A folder that this test has for itself."""
    with RocksFolder(tmp_path / "deep" / "tables") as folder:
        yield folder


def filled(folder: RocksFolder) -> RocksStore:
    """Open a store and put something into it."""
    store = folder.open(*PLACE)
    store.apply(VALUES.items(), PROGRESS, 3001, mark=Mark(3000, b"mark"))
    return store


def test_what_was_closed_opens_as_it_was(folder: RocksFolder) -> None:
    """Values, progress, position and mark are on disk, each partition in a folder by its number."""
    filled(folder).close()

    store = folder.open(*PLACE)

    assert (dict(store.items()), store.progress, store.position, store.mark) == (
        VALUES,
        PROGRESS,
        3001,
        Mark(3000, b"mark"),
    )
    assert store.path == folder.path / "files" / "3"
    assert len(store) == len(VALUES)
    store.close()


def facts(store: RocksStore) -> dict[str, Any]:
    """Return what RocksDB itself says of the options in force."""
    log = (store.path / "LOG").read_text()

    def said(pattern: str) -> str:
        return " ".join(sorted(set(re.findall(pattern, log))))

    return {
        "cache": store.database.property_int_value("rocksdb.block-cache-capacity"),
        "cache_address": said(r"\bblock_cache: (0x[0-9a-f]+)"),
        "buffers_address": said(r"Options\.write_buffer_manager: (0x[0-9a-f]+)"),
        "filter": said(r"filter_policy: (\w+)"),
        "block_bytes": said(r"\bblock_size: (\d+)"),
        "indexes_in_cache": said(r"cache_index_and_filter_blocks: (\d)"),
        "buffer_bytes": said(r"Options\.write_buffer_size: (\d+)"),
        "compression": said(r"Options\.compression: (\w+)"),
    }


def test_options_hold_over_a_reopen_and_all_partitions_share_one_cache(folder: RocksFolder) -> None:
    """Left to itself rocksdict opens an existing database with a cache of 8 MiB and without a filter."""
    first = filled(folder)
    made = facts(first)
    first.close()
    reopened, other = folder.open(*PLACE), folder.open("files", "changelog", 4)

    assert made == facts(reopened) == facts(other)
    assert made | {"cache_address": "", "buffers_address": ""} == {
        "cache": CACHE_BYTES,
        "cache_address": "",
        "buffers_address": "",
        "filter": "bloomfilter",
        "block_bytes": "16384",
        "indexes_in_cache": "1",
        "buffer_bytes": str(8 * 2**20),
        "compression": "LZ4",
    }
    assert made["buffers_address"].startswith("0x")
    reopened.close()
    other.close()


def test_rocksdict_still_drops_options_that_are_given_once(tmp_path: Path, folder: RocksFolder) -> None:
    """The trap that `column_families=` is for: when this fails, it can go."""
    for _ in range(2):
        database = Rdict(str(tmp_path / "trap"), folder._options())
        capacity = database.property_int_value("rocksdb.block-cache-capacity")
        database.close()

    assert capacity == 8 * 2**20


def test_buffers_are_bounded_however_many_partitions_are_written(folder: RocksFolder) -> None:
    """What eight partitions hold in memory that is not in files yet is charged to the one cache.

    160 MiB are written; full buffers go to files in the background, so there may be more than one set of them.
    """
    opened = [folder.open("files", "changelog", number) for number in range(8)]
    value = bytes(4000)
    for piece in range(20):
        for store in opened:
            changes = [(b"%d/%d" % (piece, number), value) for number in range(250)]
            store.apply(changes, None, store.position + 250)
            assert folder._buffers.get_usage() < 3 * WRITE_BUFFERS_BYTES

    assert folder.cache.get_usage() < 2 * CACHE_BYTES
    for store in opened:
        store.close()


def test_a_folder_belongs_to_one_process(folder: RocksFolder) -> None:
    """A second taker is told what to do, and the first one goes on."""
    with pytest.raises(SettingsError, match=r"TABLE_DIR: .*tables is used by another process: give each process"):
        RocksFolder(folder.path).__enter__()

    store = filled(folder)
    store.close()


def test_a_killed_process_leaves_no_lock(tmp_path: Path) -> None:
    """The lock goes with its process, not with a file that somebody has to delete."""
    script = (
        "import sys\nfrom pathlib import Path\nfrom tables.rocks import RocksFolder\n"
        "with RocksFolder(Path(sys.argv[1])):\n    print('taken', flush=True)\n    sys.stdin.read()\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", script, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"taken\n"
        with pytest.raises(SettingsError, match="used by another process"):
            RocksFolder(tmp_path).__enter__()
        process.kill()
        process.wait()

    with RocksFolder(tmp_path) as folder:
        filled(folder).close()


@pytest.mark.parametrize("place", ["file", "file/below", "/proc/none"])
def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path, place: str) -> None:
    """The start says so in one line, by the name of the variable."""
    (tmp_path / "file").touch()

    with pytest.raises(SettingsError, match=r"TABLE_DIR: .* cannot be made or written: "):
        RocksFolder(tmp_path / place).__enter__()


def test_the_kind_is_chosen_by_the_settings(tmp_path: Path) -> None:
    """Memory needs nothing; RocksDB takes the folder, and leaves it in the end."""
    with stores(Settings(table_store="memory")) as open_store:
        assert not open_store(*PLACE).on_disk
    settings = Settings(table_store="rocksdb", table_dir=tmp_path / "t")
    for _ in range(2):
        with stores(settings) as open_store:
            store = open_store(*PLACE)
            assert store.on_disk
            store.close()


def test_a_missing_extra_is_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """It says what to install."""
    monkeypatch.setitem(sys.modules, "rocksdict", None)
    monkeypatch.delitem(sys.modules, "tables.rocks")

    with (
        pytest.raises(SettingsError, match=r"pip install 'stampline\[rocksdb\]'"),
        stores(Settings(table_store="rocksdb", table_dir=tmp_path)),
    ):
        pass


def _newest(path: Path, pattern: str) -> Path:
    return max(path.glob(pattern), key=lambda file: file.name)


def _scribble(file: Path) -> None:
    with file.open("r+b") as data:
        data.seek(20)
        data.write(b"\xff" * 40)


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: _newest(path, "*.sst").unlink(),
        lambda path: _newest(path, "*.sst").write_bytes(b""),
        lambda path: _scribble(_newest(path, "MANIFEST-*")),
        lambda path: _newest(path, "MANIFEST-*").unlink(),
        lambda path: (path / "CURRENT").write_text("garbage"),
        lambda path: (path / "CURRENT").unlink(),
    ],
    ids=["table gone", "table empty", "manifest", "manifest gone", "current", "current gone"],
)
def test_damaged_files_are_named_with_what_to_do(folder: RocksFolder, damage: Callable[[Path], object]) -> None:
    """They are not repaired: the changelog has everything, and after deleting the folder it is used."""
    filled(folder).close()
    path = folder.path / "files" / "3"
    damage(path)

    with pytest.raises(RecoveryFailed, match=rf"the store in {path} is damaged: delete {path}, the changelog restores"):
        folder.open(*PLACE)


def test_a_damaged_block_is_found_where_it_is_read(tmp_path: Path) -> None:
    """Neither a lookup nor a listing takes it for a key that is not there."""
    with RocksFolder(tmp_path) as folder:
        filled(folder).close()
    _scribble(_newest(tmp_path / "files" / "3", "*.sst"))
    # Another cache: this one would still have the block.
    with RocksFolder(tmp_path) as folder, pytest.raises(RecoveryFailed, match="is damaged: delete"):
        dict(folder.open(*PLACE).items())


def test_a_store_of_another_topic_is_refused(folder: RocksFolder) -> None:
    """Another prefix or partition in the same folder would be another table's state."""
    filled(folder).close()

    with pytest.raises(RecoveryFailed, match="is of changelog partition 3, not of other-changelog partition 3"):
        folder.open("files", "other-changelog", 3)
    folder.open(*PLACE).close()


@pytest.mark.parametrize(
    ("key", "value", "why"),
    [
        (
            b"\x00store",
            _encode_header(_Header(2, "changelog", 3, 1, None, None)),
            "has format 2: run the newer version",
        ),
        (b"\x00store", b"garbage", "was written by another version: run that one, or delete .*/files/3"),
        (PROGRESS_KEY, b"garbage", "was written by another version: run that one, or delete .*/files/3"),
    ],
)
def test_a_store_of_another_version_is_refused(folder: RocksFolder, key: bytes, value: bytes, why: str) -> None:
    """It is not guessed what it means, and it is left as it is."""
    store = filled(folder)
    store.database[key] = value
    store.close()

    for _ in range(2):
        with pytest.raises(RecoveryFailed, match=why):
            folder.open(*PLACE)


def test_another_programs_database_is_refused(folder: RocksFolder) -> None:
    """It is left as it is."""
    path = folder.path / "files" / "3"
    path.parent.mkdir()
    options = Options(raw_mode=True)
    options.create_if_missing(create_if_missing=True)
    foreign = Rdict(str(path), options)
    foreign[b"key"] = b"value"
    foreign.close()

    with pytest.raises(RecoveryFailed, match="is a database that is not ours: set another TABLE_DIR"):
        folder.open(*PLACE)


def test_a_store_that_is_open_already_is_tried_again(folder: RocksFolder) -> None:
    """One that is still being closed is a matter of a moment."""
    store = filled(folder)
    with pytest.raises(ServiceUnavailable, match="lock"):
        folder.open(*PLACE)
    store.close()
    folder.open(*PLACE).close()


_DISK_FULL = """
import resource, sys
from pathlib import Path
from pipeline.errors import ServiceUnavailable
from pipeline.events import PROGRESS_KEY, Progress
from tables.rocks import RocksFolder

PLACE = ("files", "changelog", 3)
_, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
model = {}
with RocksFolder(Path(sys.argv[1])) as folder:
    store = folder.open(*PLACE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, hard))  # Python ignores the signal: a write gets EFBIG.
    number = 0
    try:
        while True:
            batch = {b"%d" % key: b"%d" % number * 20 for key in range(number, number + 100)}
            store.apply(batch.items(), Progress(next_input_offset=number, outcomes={}), number + 100)
            model |= batch
            number += 100
    except ServiceUnavailable as exc:
        print(exc)
    store.close()
    resource.setrlimit(resource.RLIMIT_FSIZE, (10, hard))
    try:
        folder.open(*PLACE)
    except ServiceUnavailable as exc:
        print(exc)
    resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    store = folder.open(*PLACE)
    print(store.position == number > 0, dict(store.items()) == model)
    store.apply(batch.items(), Progress(next_input_offset=number, outcomes={}), number + 100)
    print(dict(store.items()) == model | batch)
    store.close()
"""


def test_a_full_disk_is_told_and_costs_nothing(tmp_path: Path) -> None:
    """The batch that did not fit is not there at all; with room again the store opens where it was and goes on."""
    done = subprocess.run(
        [sys.executable, "-c", _DISK_FULL, str(tmp_path)], check=False, capture_output=True, text=True
    )
    # The log says too that the buffers were not flushed.
    lines = [line for line in done.stdout.splitlines() if "store_not_flushed" not in line]

    assert done.returncode == 0, done.stderr
    full, still_full, *rest = lines
    assert f"the store in {tmp_path}/files/3 cannot be read or written; is the disk full?" in full
    assert "is the disk full?" in still_full
    assert rest == ["True True", "True"]


def test_a_store_that_cannot_write_its_buffers_closes_all_the_same(
    folder: RocksFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it cannot write is in the changelog; the log says so."""
    store = filled(folder)

    class Failing:
        def close(self) -> None:
            store_database.close()
            raise Exception("IO error: No space left on device")  # noqa: TRY002 - as rocksdict does

    store_database, store._database = store._database, Failing()  # type: ignore[assignment]
    with capture_logs() as logs:
        store.close()

    assert [line["event"] for line in logs] == ["store_not_flushed"]
    folder.open(*PLACE).close()
