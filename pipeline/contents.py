"""Where the bytes of a file come from: reads `file://` contents, safely, in bounded memory.

Blocking code, for threads. A path is resolved before it is opened and checked again on the opened descriptor,
so that a symlink swapped in between cannot lead out of the roots.
"""

from __future__ import annotations

import errno
import os
import stat
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final
from urllib.parse import unquote_to_bytes, urlsplit

from blake3 import blake3

from pipeline.errors import ContentUnavailable

#: Times a file is read that changes while it is read.
READ_ATTEMPTS: Final = 3
#: Bytes read between two looks at the clock and at the cancel flag.
CHUNK_BYTES: Final = 1024 * 1024


@dataclass(frozen=True, slots=True)
class Digest:
    """The BLAKE3-256 of a content, as bytes, and the content's size in bytes."""

    value: bytes
    size: int


@dataclass(frozen=True, slots=True)
class FileContents:
    """Hashes files under the allowed roots.

    Args:
        roots: resolved folders; without any, every path is refused.
        timeout_seconds: longest a content may take.
        cancelled: asked between chunks; once it is true the read ends with `InterruptedError`.
    """

    roots: Sequence[Path]
    timeout_seconds: float
    cancelled: Callable[[], bool] = bool

    def digest(self, uri: str) -> Digest:
        """Return the digest of the file that `uri` names.

        Raises:
            ContentUnavailable: with one of the reasons `bad_uri`, `unknown_scheme`, `content_forbidden`,
                `content_missing`, `content_unreadable`, `content_not_regular`, `content_changed` or
                `content_timeout`.
            InterruptedError: the read was cancelled.
        """
        path = _path_of(uri)
        deadline = time.monotonic() + self.timeout_seconds
        for _ in range(READ_ATTEMPTS):
            digest = self._read(path, deadline)
            if digest is not None:
                return digest
        raise ContentUnavailable("content_changed", f"the file changed each of the {READ_ATTEMPTS} times it was read")

    def _read(self, path: bytes, deadline: float) -> Digest | None:
        """Read the file once; None if it changed meanwhile."""
        try:
            descriptor = self._open_by_place(path) if _HAS_PLACES else self._open_by_name(path)
            try:
                return self._hash(descriptor, deadline)
            finally:
                os.close(descriptor)
        except (FileNotFoundError, NotADirectoryError) as exc:
            raise ContentUnavailable("content_missing", "there is no such file") from exc
        except PermissionError as exc:
            raise ContentUnavailable("content_unreadable", "the hasher may not read this file") from exc
        except InterruptedError:
            raise
        except OSError as exc:
            if exc.errno in _OURS:
                raise
            raise ContentUnavailable("content_unreadable", os.strerror(exc.errno or 0)) from exc

    def _open_by_place(self, path: bytes) -> int:
        """Open a file on Linux: find its place in the file system first, and open that, whatever the name becomes.

        Finding a place opens nothing, so a device or a FIFO is left alone; and it is one system call where resolving
        the name here would be one for each folder.
        """
        try:
            place = os.open(path, os.O_PATH | os.O_CLOEXEC)
        except OSError:
            # Whether something exists outside the roots must make no difference to the answer.
            self._check_inside(os.path.realpath(path))
            raise
        try:
            link = f"/proc/self/fd/{place}"
            self._check_inside(os.readlink(link.encode()))
            _check_regular(os.fstat(place))
            return os.open(link, os.O_RDONLY | os.O_CLOEXEC)
        finally:
            os.close(place)

    def _open_by_name(self, path: bytes) -> int:
        """Open a file elsewhere: resolve its name, and open that without following a symlink put there meanwhile."""
        resolved = os.path.realpath(path)
        self._check_inside(resolved)
        _check_regular(os.stat(resolved))
        return os.open(resolved, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOFOLLOW)

    def _hash(self, descriptor: int, deadline: float) -> Digest | None:
        before = os.fstat(descriptor)
        _check_regular(before)
        hasher = blake3()
        size = 0
        # One read more than the size needs would cost a system call for each small file; a file that grew is
        # noticed by its size afterwards.
        while size < before.st_size and (chunk := os.read(descriptor, min(CHUNK_BYTES, before.st_size - size))):
            hasher.update(chunk)
            size += len(chunk)
            if self.cancelled():
                raise InterruptedError
            if time.monotonic() > deadline:
                raise ContentUnavailable("content_timeout", f"not read within {self.timeout_seconds:g} s")
        after = os.fstat(descriptor)
        if size != after.st_size or before.st_size != after.st_size or before.st_mtime_ns != after.st_mtime_ns:
            return None
        return Digest(hasher.digest(), size)

    def _check_inside(self, resolved: bytes) -> None:
        if not any(_is_below(resolved, os.fsencode(root)) for root in self.roots):
            raise ContentUnavailable("content_forbidden", "the path is not under one of ALLOWED_ROOTS")


_HAS_PLACES: Final = hasattr(os, "O_PATH") and os.path.isdir("/proc/self/fd")
#: Shortages of this process, not faults of the file: the batch is tried again.
_OURS: Final = frozenset({errno.ENOMEM, errno.ENFILE, errno.EMFILE})


def _check_regular(status: os.stat_result) -> None:
    if not stat.S_ISREG(status.st_mode):
        raise ContentUnavailable("content_not_regular", "the uri names no regular file")


def _is_below(path: bytes, root: bytes) -> bool:
    return path.startswith(root if root.endswith(b"/") else root + b"/")


def _path_of(uri: str) -> bytes:
    """Return the path of a `file://` uri.

    Raises:
        ContentUnavailable: `unknown_scheme` or `bad_uri`.
    """
    scheme, separator, _ = uri.partition("://")
    if not separator or scheme.lower() != "file":
        raise ContentUnavailable("unknown_scheme", "no content in the event, and its uri is not a file:// uri")
    try:
        parts = urlsplit(uri)
    except ValueError as exc:
        raise ContentUnavailable("bad_uri", f"not a uri: {exc}") from exc
    if parts.netloc not in {"", "localhost"}:
        raise ContentUnavailable("bad_uri", "a file:// uri of another host; write file:///path")
    if parts.query or parts.fragment:
        raise ContentUnavailable("bad_uri", "`?` and `#` in a path must be percent-encoded")
    encoded = parts.path.upper()
    if "%2F" in encoded or "%00" in encoded or "\x00" in encoded:
        raise ContentUnavailable("bad_uri", "an encoded slash or NUL is not allowed in a path")
    path = unquote_to_bytes(parts.path)
    if not path.startswith(b"/"):
        raise ContentUnavailable("bad_uri", "the path must be absolute")
    return path
