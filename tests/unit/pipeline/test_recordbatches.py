"""Record batches are read whatever they hold."""

from __future__ import annotations

import aiokafka.consumer.fetcher
import pytest
from aiokafka import TopicPartition
from aiokafka.consumer.fetcher import READ_COMMITTED, PartitionRecords
from aiokafka.record.default_records import DefaultRecordBatchBuilder

import pipeline.kafka  # noqa: F401 - installs it
from pipeline.recordbatches import LenientRecords

pytestmark = pytest.mark.unit


def make_batch(header: str, *, count: int, compression: int = 0) -> bytes:
    """Build one record batch; every second record has the header."""
    builder = DefaultRecordBatchBuilder(2, compression, 0, -1, -1, 0, 2**20)
    for offset in range(count):
        headers = [(header, b"told")] if offset % 2 else []
        builder.append(offset, timestamp=1_000 + offset, key=b"k%d" % offset, value=b"v%d" % offset, headers=headers)
    return bytes(builder.build())


def read(raw: bytes) -> list[tuple[int, bytes, bytes, tuple[tuple[str, bytes], ...]]]:
    """Read a fetch as aiokafka's consumer does."""
    records = PartitionRecords(TopicPartition("t", 0), LenientRecords(raw), [], 0, None, None, False, READ_COMMITTED)
    return [(record.offset, record.key, record.value, record.headers) for record in records]


def test_consumers_read_with_it() -> None:
    """Aiokafka's fetcher makes its batches of ours."""
    assert aiokafka.consumer.fetcher.MemoryRecords is LenientRecords


def test_a_good_batch_is_read_as_aiokafka_reads_it() -> None:
    """Records, keys, values and headers are those that were written, over several batches."""
    assert read(make_batch("name", count=3)) == [
        (0, b"k0", b"v0", ()),
        (1, b"k1", b"v1", (("name", b"told"),)),
        (2, b"k2", b"v2", ()),
    ]
    assert read(b"") == []


def test_a_header_name_that_is_no_text_is_escaped_and_nothing_is_lost() -> None:
    """All records of the batch come, once and in order; the bytes of the name stay readable."""
    raw = make_batch("nameABCD", count=5).replace(b"nameABCD", b"name\xff\xfe\x80!")

    assert read(raw) == [
        (number, b"k%d" % number, b"v%d" % number, ((("name\\xff\\xfe\\x80!", b"told"),) if number % 2 else ()))
        for number in range(5)
    ]
