"""Partition stores on disk: one RocksDB for each partition, below the folder that a process has for itself.

`position` and `progress` are written in the same write batch as the values, so a store is always the fold of its
changelog up to its own position, whatever happened to the process: a restart reads only what came after. RocksDB's log
is written but not synced. So a kill loses nothing, and a power loss may lose the last batches, of all three alike: what
is missing is read from the changelog again.

What RocksDB says goes two ways. Files that are damaged or of another topic are `RecoveryFailed`: delete them, the
changelog restores them. A disk that does not write is `ServiceUnavailable`: the lane closes the store, and once there
is room it opens again where it was.

Imports rocksdict, of the extra `[rocksdb]`; `tables.kinds` imports this module only where it is asked for.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import TracebackType
from typing import ClassVar, Final, Self

import msgspec
from msgspec import Struct
from rocksdict import (
    BlockBasedOptions,
    Cache,
    DBCompressionType,
    DBRecoveryMode,
    Options,
    Rdict,
    WriteBatch,
    WriteBufferManager,
)

from pipeline.errors import RecoveryFailed, ServiceUnavailable, SettingsError, StamplineError
from pipeline.events import PROGRESS_KEY, Progress, decode_progress, encode_record
from pipeline.logs import get_logger
from tables.store import Mark

log = get_logger("stampline.tables")

#: All the memory that the stores of a process take together, whatever their number: blocks that were read, indexes,
#: filters, and the buffers below. A laptop does not notice it, and 3 million files have 4 MiB of filters.
CACHE_BYTES: Final = 64 * 2**20
#: The part of it that may hold what is not in files yet. Less means more and smaller files to merge.
WRITE_BUFFERS_BYTES: Final = 32 * 2**20
#: One partition's share, after which its buffer becomes a file. What a kill leaves to be read again at the next start.
_WRITE_BUFFER_BYTES: Final = 8 * 2**20
_WRITE_BUFFERS_MAX: Final = 4
#: A restore writes faster than files are merged. RocksDB would brake it inside our own thread; it may fall behind.
_FILES_BEFORE_BRAKING: Final = 64
#: Of one store; with the usual limit of 1024 open files there is room for eight partitions and the sockets.
_OPEN_FILES_MAX: Final = 64
#: 10 bits a key let one read in a hundred look into a file for nothing.
_FILTER_BITS_PER_KEY: Final = 10
#: Half the index of 4 KiB blocks, and a third less on disk.
_BLOCK_BYTES: Final = 16 * 2**10

#: Beside the values there are two keys of our own; no uri begins with NUL (`pipeline.events`).
_HEADER_KEY: Final = b"\x00store"
_FIRST_KEY: Final = b"\x01"
_OWN_KEYS: Final = 2
_FORMAT: Final = 1

#: How RocksDB begins what trying again does not change.
_DAMAGED: Final = ("Corruption", "Invalid argument", "Not implemented")

#: Keys read at a time when all are asked for: an iterator that lives on would keep a closed database open.
_PAGE_KEYS: Final = 1000


class _Header(Struct, frozen=True, gc=False, array_like=True):
    """What a store is the fold of, and up to where. A field is only ever added at the end, with a default."""

    format: int
    topic: str
    partition: int
    position: int
    mark_offset: int | None
    mark_value: bytes | None


_encode_header: Final = msgspec.msgpack.Encoder().encode
_decode_header: Final = msgspec.msgpack.Decoder(_Header).decode


class RocksFolder:
    """The folder TABLE_DIR with all stores of this process; a context manager that holds the folder's lock.

    The lock is the file `.lock`, by `flock`: it goes with the process, however that ends.

    Args:
        path: TABLE_DIR.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock: int | None = None
        self.cache = Cache(CACHE_BYTES)
        self._buffers = WriteBufferManager.new_write_buffer_manager_with_cache(
            WRITE_BUFFERS_BYTES, allow_stall=False, cache=self.cache
        )

    def __enter__(self) -> Self:
        """Make the folder where there is none, and take it.

        Raises:
            SettingsError: another process has it, or it cannot be made or written.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            lock = os.open(self.path / ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except OSError as exc:
            raise SettingsError(f"TABLE_DIR: {self.path} cannot be made or written: {exc.strerror}") from exc
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as exc:
            os.close(lock)
            raise SettingsError(
                f"TABLE_DIR: {self.path} is used by another process: give each process a folder of its own"
            ) from exc
        self._lock = lock
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def open(self, table: str, topic: str, partition: int) -> RocksStore:
        """Open the store of a partition, a new one where there is none: the `OpenStore` of this kind.

        Raises:
            RecoveryFailed: the files are damaged, of another changelog or of a newer version.
            ServiceUnavailable: the disk does not do it now.
        """
        assert self._lock is not None, "a folder is used inside `with`"
        path = self.path / table / str(partition)
        try:
            path.parent.mkdir(exist_ok=True)
            options = self._options()
            # An existing database is opened with the options that are in its files, of which neither the cache nor the
            # filter is one, unless they are given for each column family too.
            database = Rdict(str(path), options, column_families={"default": options})
        except Exception as exc:
            raise _fault(path, exc) from exc
        try:
            return RocksStore(path, database, topic, partition)
        except BaseException:
            _close(path, database)
            raise

    def _options(self) -> Options:
        blocks = BlockBasedOptions()
        blocks.set_block_cache(self.cache)
        blocks.set_cache_index_and_filter_blocks(v=True)
        blocks.set_bloom_filter(_FILTER_BITS_PER_KEY, block_based=False)
        blocks.set_block_size(_BLOCK_BYTES)
        options = Options(raw_mode=True)
        options.create_if_missing(create_if_missing=True)
        options.set_block_based_table_factory(blocks)
        options.set_write_buffer_manager(self._buffers)
        options.set_write_buffer_size(_WRITE_BUFFER_BYTES)
        options.set_max_write_buffer_number(_WRITE_BUFFERS_MAX)
        options.set_level_zero_slowdown_writes_trigger(_FILES_BEFORE_BRAKING)
        options.set_level_zero_stop_writes_trigger(2 * _FILES_BEFORE_BRAKING)
        options.set_compression_type(DBCompressionType.lz4())
        options.set_max_open_files(_OPEN_FILES_MAX)
        # What was cut off by a power loss ends the log; everything before it is whole batches.
        options.set_wal_recovery_mode(DBRecoveryMode.point_in_time())
        options.set_keep_log_file_num(2)
        options.set_max_log_file_size(2**20)
        options.set_stats_dump_period_sec(0)
        return options


class RocksStore:
    """A partition on disk. Made by `RocksFolder.open`; a failed one is closed and opened again."""

    on_disk: ClassVar[bool] = True

    def __init__(self, path: Path, database: Rdict, topic: str, partition: int) -> None:
        self.path = path
        self.position = 0
        self.progress: Progress | None = None
        self.mark: Mark | None = None
        self._database = database
        self._closed = False
        self._topic = topic
        self._partition = partition
        self._read_header()

    def _read_header(self) -> None:
        raw = self.get(_HEADER_KEY)
        if raw is None:
            if next(self._page(b""), None) is not None:
                raise RecoveryFailed(f"{self.path} is a database that is not ours: set another TABLE_DIR")
            return
        try:
            header = _decode_header(raw)
            value = self.get(PROGRESS_KEY)
            progress = decode_progress(value) if value is not None else None
        except msgspec.MsgspecError as exc:
            raise RecoveryFailed(
                f"the store in {self.path} was written by another version: run that one, or {self.remedy}"
            ) from exc
        if header.format != _FORMAT:
            raise RecoveryFailed(f"the store in {self.path} has format {header.format}: run the newer version")
        if (header.topic, header.partition) != (self._topic, self._partition):
            raise RecoveryFailed(
                f"the store in {self.path} is of {header.topic} partition {header.partition}, not of {self._topic} "
                f"partition {self._partition}: set another TABLE_DIR, or {self.remedy}"
            )
        self.position = header.position
        self.progress = progress
        if header.mark_offset is not None and header.mark_value is not None:
            self.mark = Mark(header.mark_offset, header.mark_value)

    @property
    def remedy(self) -> str:
        """What a person does to have it made anew."""
        return f"delete {self.path}, the changelog restores it"

    @property
    def database(self) -> Rdict:
        """The database, for a look at its properties."""
        return self._database

    def get(self, key: bytes) -> bytes | None:
        """Return the value of a key; see `PartitionStore`."""
        try:
            value: bytes | None = self._database.get(key)
        except Exception as exc:
            raise _fault(self.path, exc) from exc
        return value

    def apply(
        self,
        changes: Iterable[tuple[bytes, bytes]],
        progress: Progress | None,
        position: int,
        *,
        mark: Mark | None = None,
        gone: Iterable[bytes] = (),
    ) -> None:
        """Take over a piece of the changelog in one write; see `PartitionStore`.

        A write holds the interpreter, so no thread would help: what is written at once should be thousands of keys, not
        millions (1 µs each).
        """
        assert position >= self.position, "a changelog only grows"
        mark = mark or self.mark
        batch = WriteBatch(raw_mode=True)
        put = batch.put
        for key, value in changes:
            put(key, value)
        for key in gone:
            batch.delete(key)
        if progress is not None:
            put(PROGRESS_KEY, encode_record(progress))
        put(
            _HEADER_KEY,
            _encode_header(_Header(_FORMAT, self._topic, self._partition, position, *(mark or (None,) * 2))),
        )
        try:
            self._database.write(batch)
        except Exception as exc:
            raise _fault(self.path, exc) from exc
        self.position = position
        self.progress = progress
        self.mark = mark

    def items(self) -> Iterator[tuple[bytes, bytes]]:
        """Yield keys and values in the order of the keys; what changes meanwhile may be seen or not."""
        start = _FIRST_KEY
        while True:
            page = list(self._page(start))
            yield from page
            if len(page) < _PAGE_KEYS:
                return
            start = page[-1][0] + b"\x00"

    def _page(self, start: bytes) -> Iterator[tuple[bytes, bytes]]:
        try:
            # `Rdict.items` would take a damaged block for the end.
            cursor = self._database.iter()
            cursor.seek(start)
            for _ in range(_PAGE_KEYS):
                if not cursor.valid():
                    break
                yield cursor.key(), cursor.value()
                cursor.next()
            cursor.status()
        except Exception as exc:
            raise _fault(self.path, exc) from exc

    def __len__(self) -> int:
        """The number of keys as RocksDB estimates it: a key that changed lately may count more than once."""
        estimate: int | None = self._database.property_int_value("rocksdb.estimate-num-keys")
        return max(0, (estimate or 0) - _OWN_KEYS)

    def close(self) -> None:
        """Write the buffers to files and let go of them. What cannot be written is in the changelog."""
        if self._closed:
            return
        self._closed = True
        _close(self.path, self._database)


def _close(path: Path, database: Rdict) -> None:
    try:
        database.close()
    except Exception as exc:  # noqa: BLE001 - rocksdict has no narrower one, and closed it is
        log.warning("store_not_flushed", folder=str(path), error=str(exc))


def _fault(path: Path, exc: Exception) -> StamplineError:
    """Return our error for one of rocksdict's: they are plain exceptions, told apart by how their text begins."""
    if isinstance(exc, StamplineError):
        return exc
    text = str(exc)
    if text.startswith(_DAMAGED) or (text.startswith("IO error") and "No such file" in text):
        return RecoveryFailed(f"the store in {path} is damaged: delete {path}, the changelog restores it ({text})")
    return ServiceUnavailable(
        f"the store in {path} cannot be read or written; is the disk full? "
        f"Nothing is lost, it goes on once there is room ({text})"
    )
