"""The store behind a table: per partition, encoded bytes, written a whole batch at a time.

A partition's store is the fold of its changelog up to `position`; the values are the changelog's own bytes. There are
two kinds behind one protocol: in memory (`MemoryStore`, here) and on disk (`RocksStore`, in `tables.rocks`).

`BatchStore` shows all partitions of a table as one Faust store, so that the table is in `app.tables` and in Faust's web
view; but nobody writes to it key by key.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple, NoReturn, Protocol

import faust
import msgspec
from faust.stores.base import SerializedStore

from pipeline.events import Progress, decode_change, recent_events


class Mark(NamedTuple):
    """The last progress record that a store has taken: its offset in the changelog, and its bytes.

    A changelog that has another record at that offset is not the one that the store was made from.
    """

    offset: int
    value: bytes


class PartitionStore(Protocol):
    """The state of one partition, of whichever kind."""

    @property
    def position(self) -> int:
        """The next changelog offset that is not in the store yet."""

    @property
    def progress(self) -> Progress | None:
        """How far the partition had come in its input at `position`; None = it never began."""

    @property
    def mark(self) -> Mark | None:
        """Where the last progress record stood; None = there was none yet."""

    @property
    def on_disk(self) -> bool:
        """Whether the state outlives the object: what is closed can be opened again, at the same position."""

    @property
    def remedy(self) -> str:
        """What a person does to have a store that does not fit its changelog made anew."""

    @property
    def get(self) -> Callable[[bytes], bytes | None]:
        """Return the newest changelog value of a key, None where there is none; raises as `apply` does."""

    def apply(
        self,
        changes: Iterable[tuple[bytes, bytes]],
        progress: Progress | None,
        position: int,
        *,
        mark: Mark | None = None,
        gone: Iterable[bytes] = (),
    ) -> None:
        """Take over a piece of the changelog up to `position`, all of it or nothing.

        Args:
            changes: key and value of its records, in order, each key at most once in `gone` and here together.
            progress: the progress at `position`.
            position: the offset after the piece.
            mark: the last progress record of the piece; None = it holds none.
            gone: the keys whose last record was a tombstone.

        Raises:
            ServiceUnavailable: the disk does not take it (it may be full): close, open again, and restore.
            RecoveryFailed: the files are damaged.
        """

    def items(self) -> Iterator[tuple[bytes, bytes]]:
        """Yield keys and values."""

    def __len__(self) -> int:
        """The number of keys; on disk an estimate."""

    def close(self) -> None:
        """Let go of files; safe to call twice. A store in memory has none."""


@dataclass(slots=True)
class MemoryStore:
    """A partition in memory: `values` by key."""

    values: dict[bytes, bytes] = field(default_factory=dict)
    progress: Progress | None = None
    position: int = 0
    mark: Mark | None = None
    #: The dict's own method: nothing stands between the fold and the values.
    get: Callable[[bytes], bytes | None] = field(init=False, repr=False, compare=False)

    on_disk: ClassVar[bool] = False
    remedy: ClassVar[str] = "restart this node to read it as it is"

    def __post_init__(self) -> None:
        self.get = self.values.get

    def apply(
        self,
        changes: Iterable[tuple[bytes, bytes]],
        progress: Progress | None,
        position: int,
        *,
        mark: Mark | None = None,
        gone: Iterable[bytes] = (),
    ) -> None:
        """Take over a piece of the changelog; see `PartitionStore`."""
        assert position >= self.position, "a changelog only grows"
        self.values.update(changes)
        for key in gone:
            self.values.pop(key, None)
        self.progress = progress
        self.position = position
        self.mark = mark or self.mark

    def items(self) -> Iterator[tuple[bytes, bytes]]:
        """Yield keys and values."""
        return iter(self.values.items())

    def __len__(self) -> int:
        """The number of keys."""
        return len(self.values)

    def close(self) -> None:
        """Nothing is open."""


#: Opens the store of a partition by table, changelog topic and partition number.
OpenStore = Callable[[str, str, int], PartitionStore]


def open_in_memory(_table: str, _topic: str, _partition: int) -> PartitionStore:
    """Return an empty store in memory: the default `OpenStore`."""
    return MemoryStore()


class BatchStore(SerializedStore[Any, Any]):
    """All partitions of a table in this process, as the store that Faust looks into: it sees those of this node."""

    def __post_init__(self) -> None:
        #: Those that are open.
        self.partitions: dict[int, PartitionStore] = {}
        #: How the store of a partition is opened; whoever makes the table may say another way.
        self.open_partition: Callable[[int], PartitionStore] = lambda _number: MemoryStore()
        #: Those that another node works on. What is here may be behind, so nobody is answered from them.
        self.standbys: set[int] = set()

    def partition(self, number: int) -> PartitionStore:
        """Return the store of a partition: the one that is open, else what is on disk, else an empty one.

        Raises:
            ServiceUnavailable: the disk does not do it now.
            RecoveryFailed: what is on disk cannot be used.
        """
        if number not in self.partitions:
            self.partitions[number] = self.open_partition(number)
        return self.partitions[number]

    def retain(self, numbers: Iterable[int]) -> None:
        """Close and drop every partition that is not among these; its files stay, for the case that it comes back."""
        kept = set(numbers)
        for number in self.partitions.keys() - kept:
            self.partitions.pop(number).close()

    def _answering(self) -> list[PartitionStore]:
        return [store for number, store in self.partitions.items() if number not in self.standbys]

    def _get(self, key: bytes) -> bytes | None:
        # A rejected input with the wrong key may have left its uri in a partition that is not the file's.
        values = [value for store in self._answering() if (value := store.get(key)) is not None]
        return max(values, key=lambda value: decode_change(value).state is not None, default=None)

    def _set(self, key: bytes, value: bytes | None) -> NoReturn:
        raise TypeError("a table changes only through its reducer, a batch at a time")

    def _del(self, key: bytes) -> NoReturn:
        self._set(key, None)

    def _clear(self) -> NoReturn:
        self._set(b"", None)

    def _iterkeys(self) -> Iterator[bytes]:
        return (key for key, _ in self._iteritems())

    def _itervalues(self) -> Iterator[bytes]:
        return (value for _, value in self._iteritems())

    def _iteritems(self) -> Iterator[tuple[bytes, bytes]]:
        return (item for store in self._answering() for item in store.items())

    def _size(self) -> int:
        return sum(len(store) for store in self._answering())

    def _contains(self, key: bytes) -> bool:
        return any(store.get(key) is not None for store in self._answering())

    def _encode_key(self, key: Any) -> bytes:
        return key if isinstance(key, bytes) else str(key).encode()

    def _decode_key(self, key: bytes | None) -> Any:
        return key.decode() if key is not None else None

    def _decode_value(self, value: bytes | None) -> Any:
        """Decode for people: the state as JSON types, the digest in hex."""
        state = decode_change(value).state if value is not None else None
        if state is None:
            return None
        shown = dict(zip(state.__struct_fields__, msgspec.to_builtins(state), strict=True))
        return shown | {
            "digest": state.digest.hex() if state.digest else None,
            "recent": recent_events(state),
            "metadata": msgspec.json.decode(state.metadata) if state.metadata else None,
        }

    def persisted_offset(self, _tp: Any) -> None:
        """Faust keeps no offsets: a partition's store holds its own position."""

    def set_persisted_offset(self, _tp: Any, _offset: int) -> None:
        """Faust keeps no offsets: a partition's store holds its own position."""

    async def need_active_standby_for(self, _tp: Any) -> bool:
        """Whether Faust should look for a standby: never, recovery is ours."""
        return False

    def apply_changelog_batch(self, *_args: Any) -> NoReturn:
        """Refuse Faust's own recovery."""
        self._set(b"", None)

    async def backup_partition(self, *_args: Any, **_options: Any) -> NoReturn:
        """Refuse: the changelog is the backup."""
        self._set(b"", None)

    def restore_backup(self, *_args: Any, **_options: Any) -> NoReturn:
        """Refuse: the changelog is the backup."""
        self._set(b"", None)

    def reset_state(self) -> None:
        """Forget everything that is in memory."""
        self.retain(())


async def release(stores: BatchStore, number: int) -> None:
    """Let go of a partition that may come back: what is on disk is closed, what is in memory stays."""
    store = stores.partitions.get(number)
    if store is not None and store.on_disk:
        del stores.partitions[number]
        # It writes what is in its buffers, and lets other threads run meanwhile.
        await asyncio.to_thread(store.close)


class BatchTable(faust.Table[bytes, bytes]):
    """A Faust table over a `BatchStore`."""

    def _new_store(self) -> BatchStore:
        return BatchStore("batch://", self.app, self, table_name=self.name, key_type=bytes, value_type=bytes)

    @property
    def batch_store(self) -> BatchStore:
        """The store, as what it is."""
        store = self.data
        assert isinstance(store, BatchStore)
        return store
