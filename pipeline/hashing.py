"""BLAKE3 digests of a batch's contents: inline ones at once, files in jobs on threads.

A job takes many files, because opening and closing a small file costs more than hashing it. Jobs are bounded by
HASH_GENERATOR_POOL_SIZE, threads by the cores.
"""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Final, Self

from blake3 import blake3

from pipeline.contents import Digest, FileContents
from pipeline.errors import ContentUnavailable
from pipeline.settings import Settings

#: Files in one job: enough to pay for its thread switch, few enough to share a batch among the cores.
JOB_FILES: Final = 64

DigestOrError = Digest | ContentUnavailable


def digest_inline(content: bytes) -> Digest:
    """Return the digest of bytes at hand."""
    return Digest(blake3(content).digest(), len(content))


class FileHasher:
    """Hashes files on threads; a context manager. Jobs that were cancelled end within a chunk's time."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._jobs = asyncio.Semaphore(settings.hash_generator_pool_size)
        self._threads = ThreadPoolExecutor(max_workers=os.cpu_count() or 1, thread_name_prefix="hash")

    async def digest(self, uris: Sequence[str]) -> list[DigestOrError]:
        """Return for each uri its digest or why it cannot be had, in order.

        Cancelling the call cancels the jobs.
        """
        cancelled = threading.Event()
        contents = FileContents(
            self._settings.allowed_roots, self._settings.content_fetch_timeout_seconds, cancelled.is_set
        )
        jobs = [self._job(contents, uris[at : at + JOB_FILES]) for at in range(0, len(uris), JOB_FILES)]
        try:
            return [digest for digests in await asyncio.gather(*jobs) for digest in digests]
        finally:
            cancelled.set()

    async def _job(self, contents: FileContents, uris: Sequence[str]) -> list[DigestOrError]:
        async with self._jobs:
            return await asyncio.get_running_loop().run_in_executor(self._threads, _digest_all, contents, uris)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exception: object) -> None:
        """End the threads once their jobs have ended."""
        self._threads.shutdown(wait=False, cancel_futures=True)


def _digest_all(contents: FileContents, uris: Sequence[str]) -> list[DigestOrError]:
    digests: list[DigestOrError] = []
    for uri in uris:
        try:
            digests.append(contents.digest(uri))
        except ContentUnavailable as exc:
            digests.append(exc)
    return digests
