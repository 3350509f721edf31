"""Verification: proves, partition by partition, that nothing was lost and nothing was taken twice.

The log, the table and PostgreSQL are compared at one point, the watermark of one database snapshot, so a running
system can be verified. For each partition:

- every input has exactly one outcome: the outcomes in the progress record add up to the inputs in `file-events`;
- every input offset is in the history or in the dead letters, and none is in the history twice;
- no change was refused by PostgreSQL: such a change is a dead letter of the changelog, and its file lags behind;
- the history counts the same outcomes as the progress record (but for rejected inputs without a uri);
- table `files` as restored from its changelog equals the rows of `files`, in version, digest, size and place;
- each file's version is the number of its committed rows in the history, and its digest that of the last of them;
- the chain of inputs has no gap.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from pipeline.events import OUTCOMES, PROGRESS_KEY, Change, FileState, Progress, decode_change
from pipeline.logreader import LogReader
from pipeline.postgres import PostgresConnectionManager
from pipeline.settings import Settings
from pipeline.topics import DEAD_LETTERS, FILE_EVENTS, FILES_CHANGELOG, require_topics, topic_name
from projections.queries import query
from tables.changelog import restore
from tables.store import MemoryStore

#: Examples named in a fault.
_EXAMPLES: Final = 5


@dataclass(frozen=True, slots=True)
class PartitionReport:
    """What was found in one partition. `inputs` are those up to the watermark, `pending` those after it."""

    partition: int
    inputs: int
    pending: int
    outcomes: Mapping[str, int]
    repeats: int
    strays: int
    files: int
    faults: list[str] = field(default_factory=list)


def all_faults(reports: Sequence[PartitionReport]) -> list[str]:
    """Return every fault with its partition; none means that all is proved."""
    return [f"partition {report.partition}: {fault}" for report in reports for fault in report.faults]


@dataclass(frozen=True, slots=True)
class _Projected:
    """One partition as PostgreSQL shows it."""

    feed_offset: int
    files: Sequence[Any]
    history: Sequence[Any]


@dataclass(frozen=True, slots=True)
class _Letters:
    """The dead letters of one partition: the offsets of inputs, and changes by uri and feed offset.

    Only changes that are projected without their rows and that nobody has repaired since. A dead letter may be there
    twice; its offset tells that it is the same.
    """

    inputs: set[int]
    refused: Mapping[tuple[str, int], Change]

    @property
    def lagging(self) -> set[str]:
        """The files of which a change was refused."""
        return {uri for uri, _ in self.refused}


async def verify(settings: Settings) -> list[PartitionReport]:
    """Verify every partition.

    Raises:
        ServiceUnavailable: Kafka or PostgreSQL does not answer.
        TopicError: a topic is missing.
        SettingsError: the tables are missing.
    """
    partitions = await require_topics(settings)
    projected = await _read_database(settings, partitions)
    return list(await asyncio.gather(*(_verify(settings, number, item) for number, item in enumerate(projected))))


async def _read_database(settings: Settings, partitions: int) -> list[_Projected]:
    async with (
        PostgresConnectionManager(settings) as manager,
        manager.connection() as connection,
        connection.transaction(isolation="repeatable_read", readonly=True),
    ):
        marks = {row["partition"]: row["feed_offset"] for row in await connection.fetch(query("verify_watermarks"))}
        return [
            _Projected(
                marks.get(partition, 0),
                await connection.fetch(query("verify_files"), partition),
                await connection.fetch(query("verify_history"), partition),
            )
            for partition in range(partitions)
        ]


async def _verify(settings: Settings, partition: int, projected: _Projected) -> PartitionReport:
    store = MemoryStore()
    await restore(settings, topic_name(settings, FILES_CHANGELOG), partition, store, until=projected.feed_offset)
    progress = store.progress or Progress(next_input_offset=0, outcomes={})
    inputs, pending, first_offset = await _read_inputs(settings, partition, progress.next_input_offset)
    letters = await _read_dead_letters(settings, partition, projected)
    states = {key.decode(): state for key, value in store.values.items() if (state := decode_change(value).state)}
    return PartitionReport(
        partition=partition,
        inputs=len(inputs),
        pending=pending,
        outcomes={name: progress.outcomes.get(name, 0) for name in OUTCOMES},
        repeats=progress.repeats,
        strays=progress.strays,
        files=len(projected.files),
        faults=[
            *_check_inputs(progress, inputs, first_offset),
            *_check_refused(letters),
            *_check_history(progress, inputs, letters, projected.history, first_offset),
            *_check_files(states, projected, letters.lagging),
        ],
    )


async def _read_inputs(settings: Settings, partition: int, until: int) -> tuple[set[int], int, int]:
    """Return the offsets of the inputs before `until`, how many come after, and the first offset of the log."""
    before: set[int] = set()
    pending = 0
    async with LogReader(settings, topic_name(settings, FILE_EVENTS), partition) as reader:
        async for records in reader.read(0):
            offsets = [record.offset for record in records]
            before.update(offset for offset in offsets if offset < until)
            pending += sum(offset >= until for offset in offsets)
        return before, pending, reader.begin


async def _read_dead_letters(settings: Settings, partition: int, projected: _Projected) -> _Letters:
    events, changelog = (topic_name(settings, name).encode() for name in (FILE_EVENTS, FILES_CHANGELOG))
    shown = {row["input_offset"] for row in projected.history}
    inputs: set[int] = set()
    refused: dict[tuple[str, int], Change] = {}
    async with LogReader(settings, topic_name(settings, DEAD_LETTERS), partition) as reader:
        async for records in reader.read(0):
            for record in records:
                headers = dict(record.headers)
                topic, offset = headers.get("dl-topic"), int(headers.get("dl-offset", -1))
                if topic == events:
                    inputs.add(offset)
                elif topic == changelog and offset < projected.feed_offset and record.key != PROGRESS_KEY:
                    change = decode_change(record.value)
                    if change.input_offset not in shown:
                        refused[record.key.decode(), offset] = change
    return _Letters(inputs, refused)


def _check_refused(letters: _Letters) -> list[str]:
    if not letters.refused:
        return []
    offsets = [change.input_offset for change in letters.refused.values()]
    fault = (
        f"{len(offsets)} changes were refused by PostgreSQL and are dead letters (input offsets {_some(offsets)}): "
        f"the rows of {len(letters.lagging)} files lag behind: {_some(letters.lagging)}"
    )
    return [fault]


def _check_inputs(progress: Progress, inputs: set[int], first_offset: int) -> list[str]:
    faults = []
    total = sum(progress.outcomes.values())
    # What retention has taken from the log cannot be counted any more.
    if total != len(inputs) if first_offset == 0 else total < len(inputs):
        faults.append(f"{len(inputs)} inputs have {total} outcomes")
    if progress.gaps:
        faults.append(f"the chain of inputs has {progress.gaps} gaps: inputs were lost before they were hashed")
    return faults


def _check_history(
    progress: Progress, inputs: set[int], letters: _Letters, history: Sequence[Any], first_offset: int
) -> list[str]:
    faults = []
    offsets = Counter(row["input_offset"] for row in history)
    twice = [offset for offset, count in offsets.items() if count > 1]
    if twice:
        faults.append(f"{len(twice)} inputs are in the history twice: {_some(twice)}")
    missing = inputs - offsets.keys() - letters.inputs - {change.input_offset for change in letters.refused.values()}
    if missing:
        faults.append(f"{len(missing)} inputs are neither in the history nor dead letters: {_some(missing)}")
    unknown = {offset for offset in offsets if offset >= first_offset} - inputs
    if unknown:
        faults.append(f"{len(unknown)} inputs of the history are not in {FILE_EVENTS}: {_some(unknown)}")
    counted = Counter(row["outcome"] for row in history)
    counted.update(change.outcome for change in letters.refused.values())
    for outcome in OUTCOMES:
        told, shown = progress.outcomes.get(outcome, 0), counted[outcome]
        if shown > told or (shown != told and outcome != "rejected"):
            faults.append(f"outcome {outcome}: {told} reduced, {shown} in the history")
    return faults


def _check_files(states: Mapping[str, FileState], projected: _Projected, lagging: set[str]) -> list[str]:
    """Check the rows of `files`, but those that are known to lag behind."""
    faults = []
    rows = {row["uri"]: row for row in projected.files}
    differing = [
        uri
        for uri in (states.keys() | rows.keys()) - lagging
        if uri not in rows or uri not in states or not _same(states[uri], rows[uri])
    ]
    if differing:
        faults.append(f"{len(differing)} files differ between the table and `files`: {_some(differing)}")
    versions: Counter[str] = Counter()
    digests: dict[str, bytes | None] = {}
    for row in projected.history:
        if row["outcome"] == "committed":
            versions[row["uri"]] += 1
            digests[row["uri"]] = row["digest"]
    unproved = [
        uri
        for uri, row in rows.items()
        if uri not in lagging and (row["version"] != versions[uri] or row["digest"] != digests.get(uri))
    ]
    if unproved:
        faults.append(f"{len(unproved)} files are not what their history says: {_some(unproved)}")
    return faults


def _same(state: FileState, row: Any) -> bool:
    return (state.version, state.digest, state.size, state.deleted, state.input_offset) == (
        row["version"],
        row["digest"],
        row["size"],
        row["deleted"],
        row["input_offset"],
    )


def _some(items: Any) -> str:
    shown = sorted(items)[:_EXAMPLES]
    return ", ".join(str(item) for item in shown) + (", …" if len(items) > _EXAMPLES else "")
