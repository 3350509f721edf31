"""Which kind of store this process keeps its tables in (TABLE_STORE), and the folder that it needs for it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from pipeline.errors import SettingsError
from pipeline.settings import Settings
from tables.store import OpenStore, open_in_memory


@contextmanager
def stores(settings: Settings) -> Iterator[OpenStore]:
    """Take what the stores of this process need, and return how one is opened.

    Raises:
        SettingsError: RocksDB is not installed, or TABLE_DIR is another process's or cannot be written.
    """
    if settings.table_store == "memory":
        yield open_in_memory
        return
    try:
        from tables.rocks import RocksFolder  # noqa: PLC0415 - an extra that few need
    except ModuleNotFoundError as exc:
        raise SettingsError(
            "TABLE_STORE=rocksdb needs the extra `rocksdb`, which is not installed: pip install 'stampline[rocksdb]'"
        ) from exc
    assert settings.table_dir is not None, "Settings checks it"
    with RocksFolder(settings.table_dir) as folder:
        yield folder.open
