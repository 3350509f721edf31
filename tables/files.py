"""The reducer of table `files`: stamps in, outcomes and new states out.

`reduce` decides about one file, `fold` about one batch of a partition. Both are pure, total and deterministic: the
same stamps from the same state give the same changes, however they are cut into batches; time comes from the stamp.

Which stamps are taken is decided by their chain of input offsets (`intake`)::

    offset at or below the last one taken     repeat   dropped, counted: the hasher sends at least once
    continues the last one taken              taken
    starts a new chain                        taken; a gap is counted, because inputs may be missing
    anything else                             stray    dropped, counted: a zombie's; the owner's own stamp follows

What becomes of a taken stamp is its outcome, exactly one::

    rejected    the hasher could not use the input
    duplicate   its event id was seen before
    conflict    its expected version is in the past
    deferred    its expected version is in the future: to be sent in again
    gave_up     the same, and the attempts are used up: dead letter
    unchanged   the file is as the event says already
    committed   the state changed; the version is one more
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import datetime
from typing import Final, Literal, NamedTuple

from msgspec.structs import replace

from pipeline.events import (
    GONE_OPS,
    OUTCOMES,
    Before,
    Change,
    EventFacts,
    FileState,
    Outcome,
    Progress,
    Stamp,
    decode_change,
    encode_record,
    recent_events,
)

_NOTHING_YET: Final = Progress(next_input_offset=-1, outcomes={})


@dataclass(frozen=True, slots=True)
class Rules:
    """The bounds of the reducer.

    Args:
        attempts_max: times an event from the future is sent in again.
        backoff_base_ms: shortest pause before that.
        backoff_cap_ms: longest pause before that.
        dedup_ids_max: event ids remembered for a file.
        dedup_window_ms: how long an event id is remembered.
    """

    attempts_max: int = 5
    backoff_base_ms: int = 10
    backoff_cap_ms: int = 250
    dedup_ids_max: int = 8
    dedup_window_ms: int = 6 * 3600 * 1000


class Reduced(NamedTuple):
    """What became of one stamp: the outcome, the state after it (None = the file was never known), and why."""

    outcome: Outcome
    state: FileState | None
    reason: str | None = None


class Folded(NamedTuple):
    """What became of one batch.

    `changes` are the changelog's records (key, value) in order, to be followed by the progress record. `deferred` and
    `gave_up` are the stamps to send in again and those to give up.
    """

    changes: list[tuple[bytes, bytes]]
    deferred: list[Stamp]
    gave_up: list[Stamp]
    progress: Progress


Intake = Literal["take", "gap", "repeat", "stray"]


def intake(last_offset: int | None, stamp: Stamp) -> Intake:
    """Decide whether a stamp is taken, by the input offset of the last one taken (None = none yet)."""
    if last_offset is None:
        return "take" if stamp.previous_offset is None else "gap"
    if stamp.input_offset <= last_offset:
        return "repeat"
    if stamp.previous_offset == last_offset:
        return "take"
    return "gap" if stamp.previous_offset is None else "stray"


def reduce(state: FileState | None, stamp: Stamp, rules: Rules) -> Reduced:
    """Decide what one taken stamp does to the file it names."""
    if stamp.reason is not None:
        return Reduced("rejected", state, stamp.reason)
    now_ms = _milliseconds(stamp.stamped_at)
    if state is not None and _seen(state, stamp.event_id, now_ms - rules.dedup_window_ms):
        return Reduced("duplicate", state)
    version = state.version if state is not None else 0
    if stamp.expected_version is not None and stamp.expected_version != version:
        reason = f"expected version {stamp.expected_version}, is {version}"
        if stamp.expected_version < version:
            return Reduced("conflict", state, reason)
        return Reduced("deferred" if stamp.attempt < rules.attempts_max else "gave_up", state, reason)
    recent = _remember(state, stamp, now_ms, rules)
    if state is not None and _same(state, stamp):
        return Reduced("unchanged", replace(state, recent=recent))
    assert stamp.event_id is not None
    assert stamp.op is not None
    assert stamp.namespace is not None
    assert stamp.occurred_at is not None
    gone = stamp.op in GONE_OPS
    return Reduced(
        "committed",
        FileState(
            version=version + 1,
            digest=None if gone else stamp.digest,
            size=None if gone else stamp.size,
            op=stamp.op,
            deleted=gone,
            namespace=stamp.namespace,
            occurred_at=stamp.occurred_at,
            stamped_at=stamp.stamped_at,
            event_id=stamp.event_id,
            workflow_id=stamp.workflow_id,
            metadata=stamp.metadata,
            input_offset=stamp.input_offset,
            recent=recent,
        ),
    )


def fold(
    stamps: Iterable[Stamp], read: Callable[[bytes], bytes | None], progress: Progress | None, rules: Rules
) -> Folded:
    """Fold a batch of stamps of one partition.

    Args:
        stamps: in the order of `file-stamps`.
        read: gives the newest changelog value of a key, as it is before the batch.
        progress: how far the partition had come before the batch; None = nothing yet.
        rules: the reducer's bounds.
    """
    before = progress or _NOTHING_YET
    last_offset = before.next_input_offset - 1 if before.next_input_offset >= 0 else None
    outcomes = dict.fromkeys(OUTCOMES, 0) | before.outcomes
    dropped = {"repeat": before.repeats, "stray": before.strays, "gap": before.gaps, "take": 0}
    states: dict[bytes, FileState | None] = {}
    changes: list[tuple[bytes, bytes]] = []
    deferred: list[Stamp] = []
    gave_up: list[Stamp] = []
    for stamp in stamps:
        verdict = intake(last_offset, stamp)
        dropped[verdict] += 1
        if verdict in {"repeat", "stray"}:
            continue
        last_offset = stamp.input_offset
        if stamp.uri is None:
            outcomes["rejected"] += 1
            continue
        key = stamp.uri.encode()
        if key in states:
            state = states[key]
        else:
            value = read(key)
            state = decode_change(value).state if value is not None else None
        reduced = reduce(state, stamp, rules)
        outcomes[reduced.outcome] += 1
        states[key] = reduced.state
        changes.append((key, encode_record(_change(state, stamp, reduced))))
        if reduced.outcome == "deferred":
            deferred.append(stamp)
        elif reduced.outcome == "gave_up":
            gave_up.append(stamp)
    after = Progress(
        next_input_offset=last_offset + 1 if last_offset is not None else -1,
        outcomes=outcomes,
        repeats=dropped["repeat"],
        strays=dropped["stray"],
        gaps=dropped["gap"],
    )
    return Folded(changes, deferred, gave_up, after)


def resume(progress: Progress | None, tail: Iterable[Change]) -> Progress | None:
    """Return the progress of a partition at the end of a piece of its changelog, from that before its last changes.

    Each batch ends with a progress record, but a piece may end in between, and so may a whole changelog on a broker
    without transactions, where a writer can die between two record batches.
    """
    before = progress or _NOTHING_YET
    outcomes = dict(before.outcomes)
    last: Change | None = None
    for last in tail:
        outcomes[last.outcome] = outcomes.get(last.outcome, 0) + 1
    if last is None:
        return progress
    return replace(before, next_input_offset=last.input_offset + 1, outcomes=outcomes)


def backoff_ms(event_id: str, attempt: int, rules: Rules) -> float:
    """Return the pause before an event is sent in again, in ms: full jitter, drawn by the event's own id.

    Full jitter as in "Exponential Backoff And Jitter" (AWS Architecture Blog, 2015), with a least pause.
    """
    most = min(rules.backoff_cap_ms, rules.backoff_base_ms * 2**attempt)
    return random.Random(f"{event_id}/{attempt}").uniform(rules.backoff_base_ms, most)


def _change(state: FileState | None, stamp: Stamp, reduced: Reduced) -> Change:
    if reduced.outcome == "committed":
        return Change(
            outcome="committed",
            input_offset=stamp.input_offset,
            recorded_at=stamp.recorded_at,
            state=reduced.state,
            before=Before(state.digest, state.size, state.deleted) if state is not None else None,
        )
    return Change(
        outcome=reduced.outcome,
        input_offset=stamp.input_offset,
        recorded_at=stamp.recorded_at,
        state=reduced.state,
        event=EventFacts(
            event_id=stamp.event_id,
            op=stamp.op,
            namespace=stamp.namespace,
            occurred_at=stamp.occurred_at,
            digest=stamp.digest,
            size=stamp.size,
            workflow_id=stamp.workflow_id,
        ),
        reason=reduced.reason,
    )


def _same(state: FileState, stamp: Stamp) -> bool:
    return (
        state.deleted == (stamp.op in GONE_OPS)
        and (state.deleted or state.digest == stamp.digest)
        and state.namespace == stamp.namespace
        and state.metadata == stamp.metadata
    )


def _seen(state: FileState, event_id: str | None, oldest_ms: int) -> bool:
    # Almost no event is a duplicate, and a text that does not hold the id needs no taking apart.
    if event_id is None or event_id not in state.recent:
        return False
    return any(seen_id == event_id and seen_ms >= oldest_ms for seen_id, seen_ms in recent_events(state))


def _remember(state: FileState | None, stamp: Stamp, now_ms: int, rules: Rules) -> str:
    """Add an event id; the oldest go, past the number that is kept. Their age is looked at when one is met again."""
    recent = f"{state.recent if state is not None else ''}{stamp.event_id}\0{now_ms}\0"
    while recent.count("\0") > 2 * rules.dedup_ids_max:
        recent = recent.split("\0", 2)[2]
    return recent


def _milliseconds(moment: datetime) -> int:
    return int(moment.timestamp() * 1000)
