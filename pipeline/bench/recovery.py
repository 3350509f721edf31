"""How long a table takes to come back, and what it takes of memory and disk: `stampline bench --recovery`.

For each number of keys a changelog is written as the reducer writes it (transactions of changes, with a progress record
at the end), and restored by processes that have seen nothing of it, all partitions at once, as a node does that starts:

    memory, all         the store is in memory: every start is so
    rocksdb, all        the store is on disk and its folder is empty
    rocksdb, the rest   it is started again after a few thousand more records: only those are read

Whatever is restored is counted: a measurement that lacks a record or a key is an error.
"""

from __future__ import annotations

import asyncio
import importlib.metadata
import os
import platform
import random
import shutil
import subprocess
import sys
import tempfile
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Final

import msgspec
from faust.types import TP
from msgspec import Struct

from pipeline.bench.meter import foreign_seconds
from pipeline.bench.restoring import Restored
from pipeline.bench.run import machine
from pipeline.embedded import run_services
from pipeline.errors import StamplineError
from pipeline.events import PROGRESS_KEY, Before, Change, FileState, Progress, encode_record
from pipeline.records import Record
from pipeline.servers.brokers import Kafka
from pipeline.settings import Settings, load_settings
from pipeline.topics import FILE_STAMPS, FILES_CHANGELOG, TOPICS, admin_client, create_topics, topic_name
from pipeline.transactions import Writer

#: Records of the second start of a store on disk.
DIFFERENCE_RECORDS: Final = 10_000

_TRANSACTION_RECORDS: Final = 5_000
_SEED: Final = 7
_BEGIN: Final = datetime(2026, 1, 1, tzinfo=UTC)
_SIZE_BYTES_MAX: Final = 2**30

Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class RecoveryPlan:
    """What to measure: tables of so many keys, and how often."""

    keys: Sequence[int]
    runs: int = 1


class Recovery(Struct, frozen=True):
    """One measurement. Times are in s, `memory_bytes` is what the process grew by, `disk_bytes` None = nothing there.

    `foreign_load_percent` is what others took of the machine meanwhile; None = the broker's share is not known.
    """

    keys: int
    store: str
    what: str
    number: int
    records: int
    seconds: float
    keys_per_second: float
    memory_bytes: int
    memory_bytes_per_key: float
    disk_bytes_per_key: float | None
    foreign_load_percent: float | None


class RecoveryReport(Struct, frozen=True):
    """Everything that the bench found out. `value_bytes` is the mean size of a value in the changelog."""

    machine: dict[str, str | int]
    versions: dict[str, str]
    partitions: int
    value_bytes: float
    key_bytes: int
    recoveries: list[Recovery]


async def run_recovery(plan: RecoveryPlan, say: Say) -> RecoveryReport:
    """Measure the recovery of every number of keys of the plan.

    Raises:
        StamplineError: what was restored is not what was written.
        ServiceUnavailable: Kafka does not start or does not answer.
    """
    recoveries: list[Recovery] = []
    sizes: list[float] = []
    with _kafka(say) as (settings, pid):
        for number in range(1, plan.runs + 1):
            for keys in plan.keys:
                say(f"run {number} of {plan.runs}: a table of {keys} keys")
                table = _Table(settings, keys, pid, number)
                try:
                    sizes.append(await table.write())
                    recoveries += await table.measure(say)
                finally:
                    await table.aclose()
    return RecoveryReport(
        machine=machine(),
        versions={
            "stampline": importlib.metadata.version("stampline"),
            "python": platform.python_version(),
            "kafka": "not known" if pid is None else Kafka(Path(), say=say).title.removeprefix("Apache Kafka "),
            "rocksdict": importlib.metadata.version("rocksdict"),
        },
        partitions=settings.kafka_topic_partitions,
        value_bytes=round(sum(sizes) / len(sizes), 1),
        key_bytes=len(_key(0, 0)),
        recoveries=recoveries,
    )


class _Table:
    """A changelog with topics of its own, and the processes that restore it."""

    def __init__(self, settings: Settings, keys: int, pid: int | None, number: int) -> None:
        self._settings = settings.model_copy(update={"kafka_topic_prefix": f"bench-{uuid.uuid4().hex[:12]}-"})
        self._partitions = settings.kafka_topic_partitions
        self._keys = keys // self._partitions * self._partitions
        self._pid = pid
        self._number = number
        self._records = 0
        self._folder = Path(tempfile.mkdtemp(prefix="stampline-bench-"))

    async def write(self) -> float:
        """Make the topics and write one change for each key; return the mean size of a value, in bytes."""
        await create_topics(self._settings)
        return await self._write([range(self._keys // self._partitions)] * self._partitions, version=1)

    async def measure(self, say: Say) -> list[Recovery]:
        """Restore in each way and return what that took."""
        everything = self._records
        recoveries = [
            await self._restore("memory", "all", everything),
            await self._restore("rocksdb", "all", everything),
        ]
        chance = random.Random(_SEED)
        each = self._keys // self._partitions
        again = DIFFERENCE_RECORDS // self._partitions
        await self._write([[chance.randrange(each) for _ in range(again)] for _ in range(self._partitions)], version=2)
        recoveries.append(await self._restore("rocksdb", "the rest", self._records - everything))
        for recovery in recoveries:
            say(f"{recovery.store}, {recovery.what}: {recovery.records} records in {recovery.seconds:.2f} s")
        return recoveries

    async def aclose(self) -> None:
        """Delete the topics and the folder."""
        shutil.rmtree(self._folder, ignore_errors=True)
        async with admin_client(self._settings) as client:
            await client.delete_topics([topic_name(self._settings, spec.name) for spec in TOPICS])

    async def _write(self, numbers: Sequence[Sequence[int]], *, version: int) -> float:
        written = await asyncio.gather(*(self._write_one(at, part, version) for at, part in enumerate(numbers)))
        self._records += sum(records for records, _ in written)
        return sum(size for _, size in written) / sum(len(part) for part in numbers)

    async def _write_one(self, partition: int, numbers: Sequence[int], version: int) -> tuple[int, int]:
        """Write one partition as its reducer would; return the number of records, and of bytes in values."""
        settings = self._settings
        topic, stamps = topic_name(settings, FILES_CHANGELOG), TP(topic_name(settings, FILE_STAMPS), partition)
        writer = Writer(
            settings,
            partition=partition,
            group=f"{settings.kafka_topic_prefix}bench",
            transactional_id=f"{settings.kafka_topic_prefix}bench-{partition}",
            idempotent=True,
            commit_offsets=_commit_nothing,
        )
        chance = random.Random(_SEED + partition)
        records = size = 0
        await writer.open()
        try:
            for start in range(0, len(numbers), _TRANSACTION_RECORDS):
                piece = numbers[start : start + _TRANSACTION_RECORDS]
                changes = [Record(_key(partition, at), encode_record(_change(at, version, chance))) for at in piece]
                end = (version - 1) * self._keys + start + len(piece)
                progress = Progress(next_input_offset=end, outcomes={"committed": end})
                await writer.write({topic: [*changes, Record(PROGRESS_KEY, encode_record(progress))]}, {stamps: end})
                records += len(changes) + 1
                size += sum(len(change.value or b"") for change in changes)
        finally:
            await writer.aclose()
        return records, size

    async def _restore(self, store: str, what: str, records: int) -> Recovery:
        """Restore in a process of its own."""
        environment = {
            "KAFKA_BOOTSTRAP_SERVERS": self._settings.kafka_bootstrap_servers,
            "KAFKA_TOPIC_PREFIX": self._settings.kafka_topic_prefix,
            "KAFKA_TOPIC_PARTITIONS": str(self._partitions),
            "TABLE_STORE": store,
            "TABLE_DIR": str(self._folder),
        }
        before = self._foreign()
        restored = await asyncio.to_thread(_run, environment)
        foreign = self._foreign() - before
        if (restored.records, restored.keys) != (records, self._keys):
            raise StamplineError(
                f"{restored.records} records and {restored.keys} keys were restored of {records} and {self._keys}"
            )
        load = max(0.0, foreign) / restored.whole_seconds / (os.cpu_count() or 1)
        on_disk = store != "memory"
        return Recovery(
            keys=self._keys,
            store=store,
            what=what,
            number=self._number,
            records=records,
            seconds=round(restored.seconds, 3),
            keys_per_second=round(records / restored.seconds),
            memory_bytes=restored.memory_bytes,
            memory_bytes_per_key=round(restored.memory_bytes / self._keys, 1),
            disk_bytes_per_key=round(_disk_bytes(self._folder) / self._keys, 1) if on_disk else None,
            foreign_load_percent=round(load * 100, 1) if self._pid is not None else None,
        )

    def _foreign(self) -> float:
        return foreign_seconds([] if self._pid is None else [self._pid])


async def _commit_nothing(_offsets: Mapping[TP, int]) -> None:
    """Nobody reads these offsets."""


def _key(partition: int, number: int) -> bytes:
    return b"file:///data/volume-%d/projects/%09d.bin" % (partition, number)


def _change(number: int, version: int, chance: random.Random) -> Change:
    """Make a change as large as most: a file that had another content before."""
    at = _BEGIN + timedelta(milliseconds=number)
    event_id = f"{number:032x}"
    return Change(
        outcome="committed",
        input_offset=number,
        recorded_at=at,
        state=FileState(
            version=version + 1,
            digest=chance.randbytes(32),
            size=chance.randrange(_SIZE_BYTES_MAX),
            op="modified",
            deleted=False,
            namespace="default",
            occurred_at=at,
            stamped_at=at,
            event_id=event_id,
            workflow_id=None,
            metadata=b'{"owner":"www-data"}',
            input_offset=number,
            recent=f"{event_id}\0{int(at.timestamp() * 1000)}\0",
        ),
        before=Before(chance.randbytes(32), chance.randrange(_SIZE_BYTES_MAX), deleted=False),
    )


def _run(environment: Mapping[str, str]) -> Restored:
    done = subprocess.run(
        [sys.executable, "-m", "pipeline.bench.restoring"],
        env={**os.environ, **environment},
        check=False,
        capture_output=True,
    )
    if done.returncode:
        raise StamplineError(f"a restore has failed: {done.stderr.decode(errors='replace').strip()[-500:]}")
    return msgspec.json.decode(done.stdout.splitlines()[-1], type=Restored)


def _disk_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


@contextmanager
def _kafka(say: Say) -> Iterator[tuple[Settings, int | None]]:
    """Use the Kafka that the settings name, else start one; with its process id, None = it runs elsewhere."""
    settings = load_settings()
    if "kafka_bootstrap_servers" in settings.model_fields_set:
        yield settings, None
        return
    with run_services(broker="kafka", database=False, data=None, say=say) as services:
        assert services.kafka_bootstrap_servers is not None
        yield load_settings(kafka_bootstrap_servers=services.kafka_bootstrap_servers), services.pids["broker"]
