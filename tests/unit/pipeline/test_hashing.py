"""Hashing a batch's files on threads: order, bounds, and how it ends."""

from __future__ import annotations

import asyncio
import os
import resource
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from blake3 import blake3

from pipeline.contents import Digest, FileContents
from pipeline.errors import ContentUnavailable
from pipeline.hashing import JOB_FILES, FileHasher, digest_inline
from pipeline.settings import Settings

pytestmark = pytest.mark.unit


@pytest.fixture
def hasher(tmp_path: Path) -> Iterator[FileHasher]:
    """A hasher that may read the test's folder, with few jobs at once."""
    with FileHasher(Settings(allowed_roots=(tmp_path,), hash_generator_pool_size=2)) as hasher:
        yield hasher


def make_endless_file(path: Path) -> None:
    """Make a file so big that reading it takes far longer than a test, though it takes no room."""
    path.touch()
    os.truncate(path, 2**42)


def hash_threads() -> set[threading.Thread]:
    """Return the threads that hash."""
    return {thread for thread in threading.enumerate() if thread.name.startswith("hash")}


@pytest.mark.parametrize("content", [b"", b"x", b"y" * 300_000])
def test_bytes_at_hand_are_hashed_at_once(content: bytes) -> None:
    """The digest is BLAKE3-256, as `b3sum` tells it."""
    assert digest_inline(content) == Digest(blake3(content).digest(), len(content))


async def test_no_files_are_no_work(hasher: FileHasher) -> None:
    """A batch whose contents all came inline costs no thread."""
    assert await hasher.digest([]) == []


@pytest.mark.parametrize("count", [1, JOB_FILES - 1, JOB_FILES, JOB_FILES + 1, 5 * JOB_FILES + 3])
async def test_digests_come_in_the_order_of_the_files(hasher: FileHasher, tmp_path: Path, count: int) -> None:
    """However many jobs they are spread over, and whichever of them fail."""
    contents = [b"%d" % number * (number % 7) for number in range(count)]
    for number, content in enumerate(contents):
        if number % 5 != 3:
            (tmp_path / str(number)).write_bytes(content)

    found = await hasher.digest([f"file://{tmp_path}/{number}" for number in range(count)])

    assert len(found) == count
    for number, (content, digest) in enumerate(zip(contents, found, strict=True)):
        if number % 5 == 3:
            assert isinstance(digest, ContentUnavailable)
            assert digest.reason == "content_missing"
        else:
            assert digest == Digest(blake3(content).digest(), len(content))


async def test_batches_of_several_partitions_share_the_threads(hasher: FileHasher, tmp_path: Path) -> None:
    """Calls at the same time do not mix their answers, and threads do not outnumber the cores."""
    for number in range(6):
        (tmp_path / str(number)).write_bytes(b"x" * number)

    batches = [hasher.digest([f"file://{tmp_path}/{number}"] * 200) for number in range(6)]
    found = await asyncio.gather(*batches)

    assert [{digest.size for digest in batch if isinstance(digest, Digest)} for batch in found] == [
        {n} for n in range(6)
    ]
    assert len(hash_threads()) <= (os.cpu_count() or 1)


async def test_without_roots_every_file_is_refused() -> None:
    """The default settings allow nothing."""
    with FileHasher(Settings()) as hasher:
        [found] = await hasher.digest(["file:///etc/hostname"])
    assert isinstance(found, ContentUnavailable)
    assert found.reason == "content_forbidden"


async def test_a_shortage_of_ours_fails_the_batch(hasher: FileHasher, tmp_path: Path) -> None:
    """Without a free descriptor nothing is rejected: the batch is tried again when there is one."""
    (tmp_path / "a").write_bytes(b"x")
    await hasher.digest([f"file://{tmp_path}/a"])  # so that the thread is there already
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    free = os.dup(0)
    os.close(free)
    resource.setrlimit(resource.RLIMIT_NOFILE, (free, hard))
    try:
        with pytest.raises(OSError, match="Too many open files"):
            await hasher.digest([f"file://{tmp_path}/a"] * (3 * JOB_FILES))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))

    [found] = await hasher.digest([f"file://{tmp_path}/a"])
    assert found == Digest(blake3(b"x").digest(), 1)


async def test_a_cancelled_batch_stops_reading(tmp_path: Path) -> None:
    """A partition that is taken away leaves no thread behind that reads for minutes."""
    before = hash_threads()
    make_endless_file(tmp_path / "big")
    with FileHasher(Settings(allowed_roots=(tmp_path,))) as hasher:
        task = asyncio.create_task(hasher.digest([f"file://{tmp_path}/big"] * 5))
        while not hash_threads() - before:  # noqa: ASYNC110 (a thread's start has no event)
            await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    for thread in hash_threads() - before:
        await asyncio.to_thread(thread.join, 10)
        assert not thread.is_alive()


def test_a_job_is_cancelled_between_two_files_too(tmp_path: Path) -> None:
    """Small files have one chunk each; the flag is looked at in every one."""
    (tmp_path / "a").write_bytes(b"x")
    cancelled = threading.Event()
    contents = FileContents([tmp_path], 60, cancelled.is_set)
    contents.digest(f"file://{tmp_path}/a")

    cancelled.set()

    with pytest.raises(InterruptedError):
        contents.digest(f"file://{tmp_path}/a")
