"""Reading record batches whatever they hold: aiokafka gives up a whole fetch for one header name that is not UTF-8.

Such a record would end the consumer, and again after each start. So batches are read as aiokafka reads them, and one
that it cannot read is read once more in Python, with the bytes that are not UTF-8 escaped in the names of headers.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import aiokafka.consumer.fetcher
from aiokafka.record.default_records import DefaultRecordBatch, _DefaultRecordBatchPy
from aiokafka.record.memory_records import _MemoryRecordsPy


class _EscapedBytes(bytes):
    """A piece of a batch whose text is never undecodable."""

    def decode(self, encoding: str = "utf-8", errors: str = "backslashreplace") -> str:
        return bytes.decode(self, encoding, errors)


class _EscapedBuffer(bytearray):
    """A batch whose pieces are `_EscapedBytes`."""

    def __getitem__(self, key: Any) -> Any:
        piece = super().__getitem__(key)
        return _EscapedBytes(piece) if isinstance(key, slice) else piece


class LenientBatch:
    """One record batch; what aiokafka asks of a batch is asked of its own."""

    def __init__(self, raw: memoryview) -> None:
        self._raw = raw
        self._batch = DefaultRecordBatch(raw)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._batch, name)

    def __next__(self) -> Any:
        return next(self._batch)

    def __iter__(self) -> Iterator[Any]:
        try:
            yield from self._batch
        except UnicodeDecodeError:
            again = _DefaultRecordBatchPy(self._raw)
            again._maybe_uncompress()  # noqa: SLF001 - the one way to its bytes
            again._buffer = _EscapedBuffer(again._buffer)  # noqa: SLF001 - the same
            # The records before the bad one come twice; aiokafka drops what is below its position.
            yield from again


class LenientRecords(_MemoryRecordsPy):  # type: ignore[misc]  # aiokafka says nothing of its types
    """The record batches of one fetch."""

    def next_batch(self) -> Any:
        """Return the next batch, None at the end."""
        raw = self._next_slice
        if raw is None:
            return None
        if len(raw) <= self.MAGIC_OFFSET or raw[self.MAGIC_OFFSET] < 2:  # noqa: PLR2004 - older formats: aiokafka's affair
            return super().next_batch()
        self._cache_next()
        return LenientBatch(raw)


def install() -> None:
    """Have aiokafka's consumers read so."""
    aiokafka.consumer.fetcher.MemoryRecords = LenientRecords
