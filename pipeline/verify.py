"""Verification: proves, partition by partition, that nothing was lost and nothing was taken twice.

The log, the table and PostgreSQL are compared at one point, the watermark of one database snapshot, so a running
system can be verified. For each partition:

- every input has exactly one outcome: the outcomes in the progress record add up to the inputs in `file-events`, and
  the watermark stands where the progress record ends;
- every input offset is in the history or in the dead letters, and none is in the history twice;
- no change was refused by PostgreSQL: such a change is a dead letter of the changelog, and its file lags behind;
- the history counts the same outcomes as the progress record (but for rejected inputs without a uri);
- table `files` as restored from its changelog equals the rows of `files`: by count and checksum, and by key where those
  differ;
- each file's version is the number of its committed rows in the history, and its digest that of the last of them;
- `activity` equals what the history adds up to;
- the chain of inputs has no gap.

And over all partitions: `contents` equals what the live files and the history add up to. What was dropped from the
history by age is left out of all this.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from pipeline.events import OUTCOMES, PROGRESS_KEY, Change, FileState, Progress, decode_change
from pipeline.logreader import LogReader
from pipeline.postgres import Connection, PostgresConnectionManager
from pipeline.records import read_letter
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


@dataclass(frozen=True, slots=True)
class Verification:
    """What was found: in each partition, and over all of them."""

    partitions: Sequence[PartitionReport]
    faults: Sequence[str]


def all_faults(found: Verification) -> list[str]:
    """Return every fault, with its partition where it has one; none means that all is proved."""
    own = [f"partition {report.partition}: {fault}" for report in found.partitions for fault in report.faults]
    return [*own, *found.faults]


@dataclass(frozen=True, slots=True)
class _Projected:
    """One partition as PostgreSQL shows it in one snapshot."""

    feed_offset: int
    input_offset: int
    #: Number and checksum of the rows of `files`.
    files: int
    checksum: int
    #: The input offsets of the history, and those before which it was dropped by age.
    offsets: Sequence[int]
    dropped: int
    outcomes: Mapping[str, int]
    #: Files that are not what their history says.
    unproved: Sequence[str]
    #: Minutes of `activity` that are not what the history adds up to.
    minutes: Sequence[Any]


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


async def verify(settings: Settings) -> Verification:
    """Verify every partition, one after the other, so that one table at a time is in memory.

    Raises:
        ServiceUnavailable: Kafka or PostgreSQL does not answer.
        TopicError: a topic is missing.
        SettingsError: the tables are missing.
    """
    partitions = await require_topics(settings)
    async with PostgresConnectionManager(settings) as manager:
        projected, digests = await _read_database(manager, partitions)
        reports = [await _verify(settings, manager, number, item) for number, item in enumerate(projected)]
    return Verification(reports, _check_contents(digests))


async def _read_database(manager: PostgresConnectionManager, partitions: int) -> tuple[list[_Projected], Sequence[str]]:
    """Return what each partition shows, and the digests whose row of `contents` is wrong."""
    async with manager.connection() as connection, connection.transaction(isolation="repeatable_read", readonly=True):
        marks = {row["partition"]: row for row in await connection.fetch(query("verify_watermarks"))}
        projected = [await _read_partition(connection, number, marks.get(number)) for number in range(partitions)]
        digests = await connection.fetch(query("verify_contents"))
    return projected, [row["digest"] for row in digests]


async def _read_partition(connection: Connection, partition: int, mark: Any) -> _Projected:
    [files] = await connection.fetch(query("verify_files"), partition)
    [history] = await connection.fetch(query("verify_history"), partition)
    outcomes = await connection.fetch(query("verify_outcomes"), partition)
    return _Projected(
        feed_offset=mark["feed_offset"] if mark else 0,
        input_offset=mark["input_offset"] if mark else 0,
        files=files["files"],
        checksum=int(files["checksum"]),
        offsets=history["offsets"],
        dropped=history["dropped"],
        outcomes={row["outcome"]: row["inputs"] for row in outcomes},
        unproved=[row["uri"] for row in await connection.fetch(query("verify_versions"), partition)],
        minutes=[row["minute"] for row in await connection.fetch(query("verify_activity"), partition)],
    )


async def _verify(
    settings: Settings, manager: PostgresConnectionManager, partition: int, projected: _Projected
) -> PartitionReport:
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
        files=projected.files,
        faults=[
            *_check_inputs(progress, inputs, first_offset, projected),
            *_check_refused(letters),
            *_check_history(progress, inputs, letters, projected, first_offset),
            *await _check_files(manager, partition, states, projected, letters.lagging),
            *_check_activity(projected),
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
    events, changelog = (topic_name(settings, name) for name in (FILE_EVENTS, FILES_CHANGELOG))
    shown = set(projected.offsets)
    inputs: set[int] = set()
    refused: dict[tuple[str, int], Change] = {}
    async with LogReader(settings, topic_name(settings, DEAD_LETTERS), partition) as reader:
        async for records in reader.read(0):
            for record in records:
                letter = read_letter(record.headers)
                if letter is None:
                    continue  # A mark, or a record of somebody else's.
                topic, _, offset = letter.id
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


def _check_inputs(progress: Progress, inputs: set[int], first_offset: int, projected: _Projected) -> list[str]:
    faults = []
    total = sum(progress.outcomes.values())
    # What retention has taken from the log cannot be counted any more.
    if total != len(inputs) if first_offset == 0 else total < len(inputs):
        faults.append(f"{len(inputs)} inputs have {total} outcomes")
    if progress.gaps:
        faults.append(f"the chain of inputs has {progress.gaps} gaps: inputs were lost before they were hashed")
    if progress.next_input_offset != projected.input_offset:
        faults.append(
            f"the watermark says {projected.input_offset} where the feed says {progress.next_input_offset}, "
            f"both at feed offset {projected.feed_offset}"
        )
    return faults


def _check_history(
    progress: Progress, inputs: set[int], letters: _Letters, projected: _Projected, first_offset: int
) -> list[str]:
    faults = []
    offsets = set(projected.offsets)
    if len(offsets) != len(projected.offsets):
        twice = [offset for offset, count in Counter(projected.offsets).items() if count > 1]
        faults.append(f"{len(twice)} inputs are in the history twice: {_some(twice)}")
    missing = inputs - offsets - letters.inputs - {change.input_offset for change in letters.refused.values()}
    missing = {offset for offset in missing if offset >= projected.dropped}
    if missing:
        faults.append(f"{len(missing)} inputs are neither in the history nor dead letters: {_some(missing)}")
    unknown = {offset for offset in offsets if offset >= first_offset} - inputs
    if unknown:
        faults.append(f"{len(unknown)} inputs of the history are not in {FILE_EVENTS}: {_some(unknown)}")
    counted = Counter(projected.outcomes)
    counted.update(change.outcome for change in letters.refused.values())
    for outcome in OUTCOMES:
        told, shown = progress.outcomes.get(outcome, 0), counted[outcome]
        if shown > told or (shown != told and outcome != "rejected" and not projected.dropped):
            faults.append(f"outcome {outcome}: {told} reduced, {shown} in the history")
    return faults


async def _check_files(
    manager: PostgresConnectionManager,
    partition: int,
    states: Mapping[str, FileState],
    projected: _Projected,
    lagging: set[str],
) -> list[str]:
    """Check the rows of `files`, but those that are known to lag behind."""
    faults = []
    shown = {uri: state for uri, state in states.items() if state.version}
    if (len(shown), _checksum(shown)) != (projected.files, projected.checksum):
        differing = await _find_differing(manager, partition, shown, projected) - lagging
        if differing:
            faults.append(f"{len(differing)} files differ between the table and `files`: {_some(differing)}")
    unproved = set(projected.unproved) - lagging
    if unproved:
        faults.append(f"{len(unproved)} files are not what their history says: {_some(unproved)}")
    return faults


def _checksum(states: Mapping[str, FileState]) -> int:
    """Return what the query `verify_files` computes of the same files."""
    return sum(
        int(hashlib.md5(_text(uri, state).encode(), usedforsecurity=False).hexdigest()[:15], 16)
        for uri, state in states.items()
    )


def _text(uri: str, state: FileState) -> str:
    digest = "" if state.digest is None else state.digest.hex()
    size = "" if state.size is None else state.size
    return f"{uri}|{state.version}|{digest}|{size}|{'t' if state.deleted else 'f'}|{state.input_offset}"


async def _find_differing(
    manager: PostgresConnectionManager, partition: int, states: Mapping[str, FileState], projected: _Projected
) -> set[str]:
    """Compare by key, in a snapshot of its own: rows that have changed since the first one are left out."""
    async with manager.connection() as connection:
        rows = await connection.fetch(query("verify_rows"), partition)
    found = {row["uri"]: row for row in rows}
    return {
        uri
        for uri in states.keys() | found.keys()
        if not (uri in found and found[uri]["input_offset"] >= projected.input_offset)
        and not (uri in found and uri in states and found[uri]["text"] == _text(uri, states[uri]))
    }


def _check_activity(projected: _Projected) -> list[str]:
    if not projected.minutes:
        return []
    examples = _some(minute.isoformat() for minute in projected.minutes)
    return [f"{len(projected.minutes)} minutes of `activity` are not what the history adds up to: {examples}"]


def _check_contents(digests: Sequence[str]) -> list[str]:
    if not digests:
        return []
    fault = f"{len(digests)} rows of `contents` are not what `files` and the history add up to: {_some(digests)}"
    return [f"{fault}; run `stampline projections rebuild contents`"]


def _some(items: Iterable[Any]) -> str:
    known = sorted(items)
    shown = known[:_EXAMPLES]
    return ", ".join(str(item) for item in shown) + (", …" if len(known) > _EXAMPLES else "")
