"""The store behind a table: per partition, encoded bytes, written a whole batch at a time.

It is a Faust store, so that the table shows in `app.tables` and in Faust's web view; but nobody writes to it key by
key. A partition's store is the fold of its changelog up to `position`; the values are the changelog's own bytes, so
that restoring a million keys decodes none of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, NoReturn

import faust
import msgspec
from faust.stores.base import SerializedStore

from pipeline.events import Progress, decode_change, recent_events


@dataclass(slots=True)
class PartitionStore:
    """The state of one partition.

    `position` is the next changelog offset that is not in `values` yet.
    """

    values: dict[bytes, bytes] = field(default_factory=dict)
    progress: Progress | None = None
    position: int = 0

    def apply(self, changes: Iterable[tuple[bytes, bytes]], progress: Progress, position: int) -> None:
        """Take over what a committed batch wrote."""
        assert position >= self.position, "a changelog only grows"
        self.values.update(changes)
        self.progress = progress
        self.position = position


class BatchStore(SerializedStore[Any, Any]):
    """All partitions of a table in this process, as the store that Faust looks into."""

    def __post_init__(self) -> None:
        self.partitions: dict[int, PartitionStore] = {}

    def partition(self, number: int) -> PartitionStore:
        """Return the store of a partition, an empty one at first."""
        return self.partitions.setdefault(number, PartitionStore())

    def retain(self, numbers: Iterable[int]) -> None:
        """Drop every partition that is not among these."""
        kept = set(numbers)
        for number in self.partitions.keys() - kept:
            del self.partitions[number]

    def _get(self, key: bytes) -> bytes | None:
        # A rejected input with the wrong key may have left its uri in a partition that is not the file's.
        values = [store.values[key] for store in self.partitions.values() if key in store.values]
        return max(values, key=lambda value: decode_change(value).state is not None, default=None)

    def _set(self, key: bytes, value: bytes | None) -> NoReturn:
        raise TypeError("a table changes only through its reducer, a batch at a time")

    def _del(self, key: bytes) -> NoReturn:
        self._set(key, None)

    def _clear(self) -> NoReturn:
        self._set(b"", None)

    def _iterkeys(self) -> Iterator[bytes]:
        return (key for store in self.partitions.values() for key in store.values)

    def _itervalues(self) -> Iterator[bytes]:
        return (value for store in self.partitions.values() for value in store.values.values())

    def _iteritems(self) -> Iterator[tuple[bytes, bytes]]:
        return (item for store in self.partitions.values() for item in store.values.items())

    def _size(self) -> int:
        return sum(len(store.values) for store in self.partitions.values())

    def _contains(self, key: bytes) -> bool:
        return any(key in store.values for store in self.partitions.values())

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
        """Nothing is on disk."""

    def set_persisted_offset(self, _tp: Any, _offset: int) -> None:
        """Nothing is on disk."""

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
        """Forget everything."""
        self.partitions.clear()


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
