"""What `file://` contents may be read and how: real files, and every way out of the roots that a uri can try."""

from __future__ import annotations

import os
import resource
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.parse import quote

import pytest
from blake3 import blake3

from pipeline import contents as contents_module
from pipeline.contents import CHUNK_BYTES, READ_ATTEMPTS, FileContents
from pipeline.errors import ContentUnavailable

pytestmark = pytest.mark.unit


@pytest.fixture(autouse=True, params=[True, False], ids=["by place", "by name"])
def way_to_open(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both ways to open a file: the one of Linux, and the one of other systems."""
    if request.param and not contents_module._HAS_PLACES:
        pytest.skip("needs Linux")
    monkeypatch.setattr(contents_module, "_HAS_PLACES", request.param)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """The allowed folder, with one file; beside it lies a secret."""
    root = tmp_path / "root"
    root.mkdir()
    (root / "a.bin").write_bytes(b"content")
    (tmp_path / "secret").write_bytes(b"secret")
    (tmp_path / "root2").mkdir()
    (tmp_path / "root2" / "a.bin").write_bytes(b"neighbour")
    return root


@pytest.fixture
def no_descriptors_left() -> Iterator[None]:
    """Every descriptor below the limit is taken."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    free = os.dup(0)
    os.close(free)
    resource.setrlimit(resource.RLIMIT_NOFILE, (free, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, before)


def make_contents(*roots: Path, timeout_seconds: float = 60, cancelled: Callable[[], bool] = bool) -> FileContents:
    """Make the reader under test."""
    return FileContents(roots, timeout_seconds, cancelled)


def reason_of(uri: str, *roots: Path, timeout_seconds: float = 60) -> str:
    """Return why the content behind a uri cannot be had."""
    with pytest.raises(ContentUnavailable) as caught:
        make_contents(*roots, timeout_seconds=timeout_seconds).digest(uri)
    assert caught.value.detail
    return caught.value.reason


def uri_of(path: Path | bytes) -> str:
    """Return the uri of a path."""
    return "file://" + quote(os.fsencode(path))


@pytest.mark.parametrize("size", [0, 1, 1000, CHUNK_BYTES, CHUNK_BYTES + 1, 3 * CHUNK_BYTES + 17])
def test_a_digest_is_that_of_the_bytes(root: Path, size: int) -> None:
    """Empty files, files of exactly one chunk and bigger ones alike."""
    content = bytes(range(251)) * (size // 251 + 1)
    path = root / "some file ü?#%.bin"
    path.write_bytes(content[:size])

    digest = make_contents(root).digest(uri_of(path))

    assert (digest.value, digest.size) == (blake3(content[:size]).digest(), size)


@pytest.mark.parametrize("form", ["file://{}", "FILE://{}", "file://localhost{}", "file:///.{}", "file:///{}"])
def test_a_path_can_be_written_in_more_than_one_way(root: Path, form: str) -> None:
    """What is the same file to the system has the same content."""
    assert make_contents(root).digest(form.format(root / "a.bin")).value == blake3(b"content").digest()


def test_a_name_is_bytes_not_text(root: Path) -> None:
    """A name that is no UTF-8 is reached by its percent-encoded bytes."""
    path = os.fsencode(root) + b"/\xff\xfe.bin"
    with open(os.open(path, os.O_CREAT | os.O_WRONLY), "wb") as file:
        file.write(b"odd")

    assert make_contents(root).digest(uri_of(path)).value == blake3(b"odd").digest()
    assert make_contents(root).digest(f"file://{root}/%fF%Fe.bin").size == 3


def test_without_roots_nothing_may_be_read(root: Path) -> None:
    """The default is to forbid."""
    assert reason_of(uri_of(root / "a.bin")) == "content_forbidden"


def test_each_of_several_roots_is_allowed(root: Path) -> None:
    """The file system's own root means everything."""
    neighbour = root.parent / "root2"
    for roots in [(root, neighbour), (neighbour, root), (Path("/"),)]:
        assert make_contents(*roots).digest(uri_of(neighbour / "a.bin")).size == 9


@pytest.mark.parametrize(
    "path", ["/secret", "/root/../secret", "/root/%2e%2e/secret", "/root2/a.bin", "/root/a.bin/../../secret"]
)
def test_what_is_outside_the_roots_is_forbidden(root: Path, path: str) -> None:
    """Neither `..`, encoded or not, nor a folder whose name only begins like a root's leads out."""
    assert reason_of(f"file://{root.parent}{path}", root) in {"content_forbidden", "content_missing"}
    assert (root.parent / "secret").exists()


@pytest.mark.parametrize("path", ["/etc/passwd", "/proc/self/mem", "/proc/self/environ", "/dev/zero", "/dev/stdin"])
def test_the_system_is_outside(root: Path, path: str) -> None:
    """Nothing of the host can be read or even opened through a uri."""
    assert reason_of(f"file://{path}", root) == "content_forbidden"


@pytest.mark.parametrize("path", ["no-such-file", "no-such-folder/x", "secret", "secret/x"])
def test_a_uri_cannot_ask_what_exists_outside(root: Path, path: str) -> None:
    """What is there and what is not are forbidden alike, or a producer could map the host's files."""
    assert reason_of(uri_of(root.parent / path), root) == "content_forbidden"
    assert reason_of(f"file://{root}/../{path}", root) == "content_forbidden"
    (root / "link").symlink_to(root.parent / path)
    assert reason_of(uri_of(root / "link"), root) == "content_forbidden"


@pytest.mark.parametrize(
    ("target", "reason"),
    [
        ("a.bin", None),
        ("{root}/a.bin", None),
        ("../secret", "content_forbidden"),
        ("{root}/../secret", "content_forbidden"),
        ("/etc/passwd", "content_forbidden"),
        ("/dev/zero", "content_forbidden"),
        ("/proc/self/mem", "content_forbidden"),
        ("nowhere", "content_missing"),
        ("link", "content_unreadable"),
    ],
)
def test_a_symlink_is_followed_inside_the_roots_only(root: Path, target: str, reason: str | None) -> None:
    """Where it leads decides, not where it lies; one that leads to itself leads nowhere."""
    (root / "link").symlink_to(target.format(root=root))
    (root / "folder").symlink_to(root)

    for uri in (uri_of(root / "link"), uri_of(root / "folder" / "link")):
        if reason is None:
            assert make_contents(root).digest(uri).value == blake3(b"content").digest()
        else:
            assert reason_of(uri, root) == reason


def test_a_symlink_from_outside_into_a_root_is_allowed(root: Path) -> None:
    """Only the file itself must be inside."""
    (root.parent / "door").symlink_to(root)
    assert make_contents(root).digest(uri_of(root.parent / "door" / "a.bin")).size == 7


# Only Linux can open what was checked; elsewhere a folder above could be swapped in between (the README says so).
@pytest.mark.parametrize("way_to_open", [True], indirect=True, ids=["by place"])
def test_a_symlink_that_is_swapped_meanwhile_never_leads_out(root: Path) -> None:
    """What is checked is what is read, however fast the name changes its meaning."""
    for name, target in (("door", root), ("trap", root.parent)):
        (root / name).mkdir()
        (root / name / "link").symlink_to(target)
    (root / "secret").write_bytes(b"harmless")
    done = threading.Event()

    def swap() -> None:
        while not done.is_set():
            for name in ("trap", "door"):
                os.symlink(os.readlink(root / name / "link"), root / "new")
                os.replace(root / "new", root / "link")

    swapper = threading.Thread(target=swap)
    swapper.start()
    found: set[int | str] = set()
    for _ in range(400):
        try:
            found.add(FileContents([root], 60).digest(uri_of(root / "link" / "secret")).size)
        except ContentUnavailable as exc:
            found.add(exc.reason)
    done.set()
    swapper.join()

    assert found <= {len(b"harmless"), "content_forbidden", "content_missing"}


def test_only_regular_files_are_read(root: Path) -> None:
    """A FIFO would block, a device would never end, a folder has no bytes; none of them is opened."""
    os.mkfifo(root / "fifo")
    (root / "folder").mkdir()
    paths = [root / "fifo", root / "folder", root]
    if os.geteuid() == 0:
        os.mknod(root / "zero", 0o666 | stat.S_IFCHR, os.makedev(1, 5))
        paths.append(root / "zero")

    assert {reason_of(uri_of(path), root) for path in paths[:2]} == {"content_not_regular"}
    assert {reason_of(uri_of(path), root) for path in paths[3:]} <= {"content_not_regular"}
    assert reason_of(uri_of(root), root) == "content_forbidden"
    assert reason_of("file:///dev/zero", Path("/")) == "content_not_regular"
    assert reason_of("file:///dev/zero", Path("/dev")) == "content_not_regular"


@pytest.mark.parametrize("path", ["missing", "a.bin/below", "missing/below"])
def test_what_is_not_there_is_missing(root: Path, path: str) -> None:
    """The producer may be ahead of the file, or the file gone already."""
    assert reason_of(uri_of(root / path), root) == "content_missing"


def test_a_name_that_no_file_can_have_is_no_crash(root: Path) -> None:
    """The system's refusal is told."""
    assert reason_of(f"file://{root}/{'x' * 300}", root) in {"content_missing", "content_unreadable"}


def test_what_the_hasher_may_not_read_is_said_so(root: Path) -> None:
    """A file and a folder without permission are the input's fault: dead letter, not a stop."""
    (root / "closed").mkdir()
    (root / "closed" / "x").touch()
    for name in ("private", "closed"):
        (root / name).touch()
        (root / name).chmod(0)
    for folder in (root, *root.parents):
        if folder.stat().st_uid == os.geteuid() and folder != Path("/"):
            folder.chmod(folder.stat().st_mode | 0o111)
    # Root may read everything, so another user looks.
    code = (
        "import os, sys; from pathlib import Path\n"
        "from pipeline.contents import FileContents; from pipeline.errors import ContentUnavailable\n"
        "if os.geteuid() == 0: os.setgroups([]); os.setgid(65534); os.setuid(65534)\n"
        "for uri in sys.argv[2:]:\n"
        "    try: FileContents([Path(sys.argv[1])], 60).digest(uri)\n"
        "    except ContentUnavailable as exc: print(exc.reason)\n"
    )
    uris = [uri_of(root / "private"), uri_of(root / "closed" / "x"), uri_of(root / "closed" / "missing")]

    try:
        found = subprocess.run([sys.executable, "-c", code, root, *uris], capture_output=True, text=True, check=True)
    finally:
        (root / "closed").chmod(0o700)

    assert found.stdout.split() == ["content_unreadable"] * 3


@pytest.mark.parametrize(
    ("uri", "reason"),
    [
        ("file://host/a.bin", "bad_uri"),
        ("file://localhost:80/a.bin", "bad_uri"),
        ("file://user@localhost/a.bin", "bad_uri"),
        ("file://[/a.bin", "bad_uri"),
        ("file://relative", "bad_uri"),
        ("file://", "bad_uri"),
        ("file://localhost", "bad_uri"),
        ("file:///a%2Fb", "bad_uri"),
        ("file:///a%2fb", "bad_uri"),
        ("file:///a%00b", "bad_uri"),
        ("file:///a\x00b", "bad_uri"),
        ("file:///a.bin?version=1", "bad_uri"),
        ("file:///a.bin#part", "bad_uri"),
        ("file:///%ED%A0%80", "content_forbidden"),
        ("file:/a.bin", "unknown_scheme"),
        ("/a.bin", "unknown_scheme"),
        ("", "unknown_scheme"),
        ("s3://bucket/key", "unknown_scheme"),
        ("http://localhost/a.bin", "unknown_scheme"),
        ("xfile:///a.bin", "unknown_scheme"),
    ],
)
def test_a_uri_that_could_mean_two_things_is_refused(root: Path, uri: str, reason: str) -> None:
    """No guess is made about hosts, encoded separators, queries or other schemes."""
    assert reason_of(uri, root) == reason


def test_a_file_that_changes_once_is_read_again(root: Path) -> None:
    """The digest is that of one state of the file, never of a mixture."""
    path = root / "a.bin"
    path.write_bytes(b"x" * (2 * CHUNK_BYTES))
    looks = 0

    def change_at_the_first_look() -> bool:
        nonlocal looks
        looks += 1
        if looks == 1:
            path.write_bytes(b"y" * (2 * CHUNK_BYTES))
            os.utime(path, ns=(0, 1))
        return False

    digest = make_contents(root, cancelled=change_at_the_first_look).digest(uri_of(path))

    assert digest.value == blake3(b"y" * (2 * CHUNK_BYTES)).digest()


@pytest.mark.parametrize("length", [10, CHUNK_BYTES, 3 * CHUNK_BYTES])
def test_a_file_that_changes_all_the_time_is_given_up(root: Path, length: int) -> None:
    """It grows or shrinks during each of the tries, so no digest would be true; another event will follow."""
    path = root / "a.bin"
    path.write_bytes(b"x" * (2 * CHUNK_BYTES))
    turn, changed, done = threading.Event(), threading.Event(), threading.Event()
    sizes: list[int] = []

    def write() -> None:
        while turn.wait(10) and not done.is_set():
            turn.clear()
            sizes.append(length + len(sizes))
            os.truncate(path, sizes[-1])
            changed.set()

    def let_the_writer_in() -> bool:
        changed.clear()
        turn.set()
        assert changed.wait(10)
        return False

    writer = threading.Thread(target=write)
    writer.start()
    with pytest.raises(ContentUnavailable) as caught:
        make_contents(root, cancelled=let_the_writer_in).digest(uri_of(path))
    done.set()
    turn.set()
    writer.join()

    assert caught.value.reason == "content_changed"
    assert len(sizes) >= READ_ATTEMPTS


def test_a_read_that_takes_too_long_ends(root: Path) -> None:
    """The bound is looked at after each chunk."""
    assert reason_of(uri_of(root / "a.bin"), root, timeout_seconds=1e-9) == "content_timeout"


def test_the_bound_holds_for_all_tries_together(root: Path) -> None:
    """A file that changes again and again does not get the whole time for each of its tries."""
    path = root / "a.bin"
    started = time.monotonic()

    def change_and_be_slow() -> bool:
        with path.open("ab") as file:
            file.write(b"x")
        enough = time.monotonic() + 0.15
        while time.monotonic() < enough:
            pass
        return False

    with pytest.raises(ContentUnavailable) as caught:
        make_contents(root, timeout_seconds=0.25, cancelled=change_and_be_slow).digest(uri_of(path))

    assert caught.value.reason == "content_timeout"
    assert time.monotonic() - started >= 0.25


def test_a_cancelled_read_ends_within_a_chunk(root: Path) -> None:
    """A job of a revoked partition does not read a big file to its end."""
    path = root / "a.bin"
    path.touch()
    os.truncate(path, 2**40)
    looks = []

    def cancel_at_the_third_look() -> bool:
        looks.append(time.monotonic())
        return len(looks) == 3

    with pytest.raises(InterruptedError):
        make_contents(root, cancelled=cancel_at_the_third_look).digest(uri_of(path))

    assert len(looks) == 3


def test_a_shortage_of_ours_is_not_the_files_fault(root: Path, no_descriptors_left: None) -> None:
    """Without a free descriptor the batch is tried again; a dead letter would lose the event."""
    with pytest.raises(OSError, match="Too many open files") as caught:
        make_contents(root).digest(uri_of(root / "a.bin"))
    assert not isinstance(caught.value, ContentUnavailable)
