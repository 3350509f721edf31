"""The laws of the reducer of table `files`: what holds for every sequence of stamps, however it comes."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from itertools import pairwise
from typing import Any

import pytest
from aiokafka.structs import ConsumerRecord
from hypothesis import example, given
from hypothesis import strategies as st
from msgspec.structs import replace

from pipeline.contents import Digest
from pipeline.errors import ContentUnavailable
from pipeline.events import (
    ATTEMPT_HEADER,
    OUTCOMES,
    Before,
    Change,
    Progress,
    Stamp,
    decode_change,
    decode_stamp,
    recent_events,
)
from pipeline.stamps import read_batch, stamp_batch
from tables.files import Rules, backoff_ms, fold, intake, reduce, resume
from tables.store import MemoryStore

pytestmark = pytest.mark.unit

NOON = datetime(2026, 11, 23, 12, tzinfo=UTC)
#: Small bounds, so that short sequences come to all of them.
RULES = Rules(attempts_max=3, dedup_ids_max=3, dedup_window_ms=8000)
URIS = ("file:///a", "file:///b", "file:///ü")


def make_stamp(input_offset: int, previous_offset: int | None, **fields: Any) -> Stamp:
    """Make a stamp of one file, one second after the offset before it."""
    defaults: dict[str, Any] = {
        "uri": URIS[0],
        "event_id": f"event-{input_offset}",
        "op": "modified",
        "namespace": "default",
        "occurred_at": NOON,
        "recorded_at": NOON + timedelta(seconds=input_offset),
        "stamped_at": NOON + timedelta(seconds=input_offset),
        "digest": bytes([input_offset % 256]) * 32,
        "size": input_offset,
    }
    return Stamp(input_offset=input_offset, previous_offset=previous_offset, **(defaults | fields))


def chain(drawn: Iterable[tuple[int, dict[str, Any]]]) -> list[Stamp]:
    """Make a chain of stamps from pairs of (distance to the offset before, fields)."""
    stamps: list[Stamp] = []
    offset = -1
    for distance, fields in drawn:
        offset += distance
        stamps.append(make_stamp(offset, stamps[-1].input_offset if stamps else None, **fields))
    return stamps


_ACCEPTED = st.fixed_dictionaries(
    {"uri": st.sampled_from(URIS), "op": st.sampled_from(["created", "modified", "deleted", "moved"])},
    optional={
        "event_id": st.sampled_from(["e1", "e2", "e3", "e4", "e5"]),
        "digest": st.sampled_from([b"\x01" * 32, b"\x02" * 32]),
        "namespace": st.sampled_from(["default", "other"]),
        "metadata": st.sampled_from([None, b'{"k":1}']),
        "expected_version": st.integers(0, 4),
        "attempt": st.integers(0, 4),
    },
)
_REJECTED = st.fixed_dictionaries(
    {
        "uri": st.sampled_from([None, *URIS]),
        "reason": st.sampled_from(["undecodable", "content_missing"]),
        "digest": st.none(),
        "size": st.none(),
        "event_id": st.sampled_from([None, "e1"]),
        "op": st.sampled_from([None, "created", "nonsense"]),
        "namespace": st.none(),
        "occurred_at": st.none(),
    }
)
#: Gaps in offsets are normal: transaction markers take some.
_DISTANCES = st.sampled_from([1, 1, 1, 2, 5])
CHAINS = st.lists(st.tuples(_DISTANCES, _ACCEPTED | _REJECTED), min_size=1, max_size=30).map(chain)


@dataclass
class Played:
    """What came of some batches."""

    store: MemoryStore = field(default_factory=MemoryStore)
    changes: list[tuple[bytes, bytes]] = field(default_factory=list)
    deferred: list[Stamp] = field(default_factory=list)
    gave_up: list[Stamp] = field(default_factory=list)

    @property
    def progress(self) -> Progress:
        """The last progress."""
        assert self.store.progress is not None
        return self.store.progress

    def decoded(self) -> list[tuple[str, Change]]:
        """Return the changes with their uris."""
        return [(key.decode(), decode_change(value)) for key, value in self.changes]

    def outcomes(self) -> list[str]:
        """Return the outcome of each change."""
        return [change.outcome for _, change in self.decoded()]


def play(batches: Iterable[Sequence[Stamp]], rules: Rules = RULES) -> Played:
    """Fold batch after batch as the reducer does."""
    played = Played()
    for batch in batches:
        folded = fold(batch, played.store.get, played.store.progress, rules)
        played.changes += folded.changes
        played.deferred += folded.deferred
        played.gave_up += folded.gave_up
        played.store.apply(folded.changes, folded.progress, len(played.changes))
    return played


def cut(items: Sequence[Stamp], places: Iterable[int]) -> list[Sequence[Stamp]]:
    """Cut a sequence into batches; some may be empty."""
    bounds = [0, *sorted(place % (len(items) + 1) for place in places), len(items)]
    return [items[start:end] for start, end in pairwise(bounds)]


_CUTS = st.lists(st.integers(0, 1000), max_size=8)


@given(CHAINS, _CUTS)
@example(chain([(1, {})]), [0])
def test_batches_can_be_cut_anywhere(stamps: list[Stamp], places: list[int]) -> None:
    """States, changes and progress depend on the stamps alone, not on how they were cut into batches."""
    assert play(cut(stamps, places)) == play([stamps])


@given(CHAINS, st.lists(st.tuples(st.integers(0, 1000), st.integers(0, 1000)), max_size=20), _CUTS)
def test_a_stamp_that_was_taken_is_never_taken_again(
    stamps: list[Stamp], repeats: list[tuple[int, int]], places: list[int]
) -> None:
    """Repeats anywhere change nothing but their own count."""
    log = list(stamps)
    for place, which in sorted((place % len(stamps), which) for place, which in repeats)[::-1]:
        log.insert(place + 1, stamps[which % (place + 1)])

    played, once = play(cut(log, places)), play([stamps])

    assert played.changes == once.changes
    assert (played.deferred, played.gave_up) == (once.deferred, once.gave_up)
    assert played.progress == replace(once.progress, repeats=len(repeats))


def _found_by(hasher: int, stamps: Sequence[Stamp]) -> list[Stamp]:
    """Return the stamps as one of several hashers makes them: it finds what another finds, other content, or none."""
    gone: dict[str, Any] = {"digest": None, "size": None, "reason": "content_missing"}
    found = ({}, {"digest": b"\x07" * 32}, gone)[hasher % 3]
    return [replace(stamp, stamped_at=stamp.stamped_at + timedelta(milliseconds=hasher), **found) for stamp in stamps]


@st.composite
def _hashers(draw: st.DrawFn) -> tuple[list[Stamp], list[Stamp]]:
    """Draw a chain of inputs, and a log that an owner and any number of zombies have written between each other.

    Each opens where the group stands, then writes, loses what it writes and commits what has arrived, in its own time;
    nothing is lost before the chain has begun. Somebody at last opens and comes to the end.
    """
    stamps = chain(draw(st.lists(st.tuples(_DISTANCES, _ACCEPTED), min_size=1, max_size=12)))
    log: list[Stamp] = []
    committed, positions, losers = 0, [0], set()
    step = st.tuples(st.integers(0, 3), st.integers(0, 5), st.integers(1, 4))
    for who, what, count in draw(st.lists(step, min_size=8, max_size=40)):
        hasher = who % len(positions)
        batch = stamps[positions[hasher] :][:count]
        if what == 0:
            positions.append(committed)
        elif what == 1:
            committed = committed if hasher in losers else positions[hasher]
        elif what > 2 or log:
            positions[hasher] += len(batch)
            losers |= {hasher} if what == 2 else set()
            log += _found_by(hasher, batch) if what > 2 else []
    return stamps, log + _found_by(len(positions), stamps[committed:])


@given(_hashers(), _CUTS)
def test_hashers_of_one_partition_are_taken_as_one(hashers: tuple[list[Stamp], list[Stamp]], places: list[int]) -> None:
    """Whatever zombies write between the owner's stamps: each input is taken once, in order, by its first fit stamp."""
    stamps, log = hashers
    rest = iter(log)
    first_fits = [next(stamp for stamp in rest if stamp.input_offset == one.input_offset) for one in stamps]

    played = play(cut(log, places))

    assert played.changes == play([first_fits]).changes
    assert [change.input_offset for _, change in played.decoded()] == [stamp.input_offset for stamp in stamps]
    assert (sum(played.progress.outcomes.values()), played.progress.gaps) == (len(stamps), 0)
    assert played.progress.repeats + played.progress.strays == len(log) - len(stamps)


@pytest.mark.parametrize(
    ("last", "offset", "previous", "verdict"),
    [
        (None, 7, None, "take"),  # the first of all
        (None, 7, 6, "gap"),  # the beginning of the stamps is gone
        (7, 7, 6, "repeat"),
        (7, 3, None, "repeat"),  # also a new chain's, where it brings nothing new
        (7, 8, 7, "take"),
        (7, 12, 7, "take"),  # transaction markers in between
        (7, 9, 8, "stray"),
        (7, 9, 3, "stray"),
        (7, 20, None, "gap"),
    ],
)
def test_the_chain_decides_what_is_taken(last: int | None, offset: int, previous: int | None, verdict: str) -> None:
    """Each of the four verdicts, at its borders."""
    assert intake(last, make_stamp(offset, previous)) == verdict


def test_a_new_chain_counts_a_gap_and_goes_on() -> None:
    """Where retention took inputs away, the rest is still taken, and the loss is told."""
    stamps = [make_stamp(0, None), make_stamp(9, None), make_stamp(10, 9)]

    progress = play([stamps]).progress

    assert (progress.gaps, progress.next_input_offset) == (1, 11)
    assert progress.outcomes["committed"] == 3


@given(CHAINS)
def test_every_change_tells_the_truth(stamps: list[Stamp]) -> None:
    """Outcomes add up to the inputs taken; a version counts the commits; `before` is the state before."""
    played = play([stamps])
    states: dict[str, Any] = {}
    commits = dict.fromkeys(URIS, 0)

    for uri, change in played.decoded():
        before, states[uri] = states.get(uri), change.state
        commits[uri] += change.outcome == "committed"
        assert (change.state.version if change.state else 0) == commits[uri]
        if change.outcome == "committed":
            known = Before(before.digest, before.size, before.deleted) if before else None
            assert (change.before, change.event) == (known, None)
        else:
            assert change.event is not None
            assert change.before is None
            assert change.outcome == "unchanged" or change.state == before

    assert played.progress.outcomes.keys() == set(OUTCOMES)
    assert sum(played.progress.outcomes.values()) == len(stamps)
    assert played.progress.next_input_offset == stamps[-1].input_offset + 1
    assert {key.decode(): decode_change(value).state for key, value in played.store.values.items()} == states
    assert len(played.deferred) == played.progress.outcomes["deferred"]
    assert len(played.gave_up) == played.progress.outcomes["gave_up"]


_JSON_EVENTS = st.fixed_dictionaries(
    {},
    optional={
        "event_id": st.sampled_from(["e1", "e2", "", 7]),
        "uri": st.sampled_from([*URIS, "", "a\x00b", "\ud800", 3]),
        "op": st.sampled_from(["created", "modified", "deleted", "moved", "renamed", None]),
        "occurred_at": st.sampled_from(["2026-11-23T12:00:00Z", "0001-01-01T00:00:00+14:00", "yesterday"]),
        "content": st.sampled_from(["", "aGk=", "!"]),
        "target_uri": st.just("file:///b"),
        "namespace": st.sampled_from(["n", "a b"]),
        "expected_version": st.sampled_from([0, 1, 2, 2**63 - 1, -1]),
        "metadata": st.dictionaries(st.text(max_size=3), st.integers() | st.text(max_size=3), max_size=2),
    },
).map(lambda event: json.dumps(event).encode())
_HEADER_VALUES = st.none() | st.sampled_from([b"1", b"9" * 30]) | st.binary(max_size=4)
_HEADERS = st.lists(st.tuples(st.sampled_from([ATTEMPT_HEADER, "other"]), _HEADER_VALUES), max_size=2)
_KEYS = st.none() | st.sampled_from([uri.encode() for uri in URIS]) | st.binary(max_size=3)
_RECORDS = st.tuples(_KEYS, st.none() | st.binary(max_size=8) | _JSON_EVENTS, _HEADERS, st.integers(-1, 2**63 - 1))
_FINDINGS = st.sampled_from([Digest(b"\x05" * 32, 5), ContentUnavailable("content_missing", "there is no such file")])


@given(st.lists(_RECORDS, min_size=1, max_size=8), st.lists(_FINDINGS, min_size=8, max_size=8))
def test_every_stamp_of_the_hasher_can_be_folded(
    drawn: list[tuple[bytes | None, bytes | None, list[tuple[str, bytes | None]], int]],
    findings: list[Digest | ContentUnavailable],
) -> None:
    """No input, however broken, makes the reducer raise or lose count."""
    records = [
        ConsumerRecord("file-events", 0, offset, timestamp, 0, key, value, None, 0, 0, tuple(headers))
        for offset, (key, value, headers, timestamp) in enumerate(drawn)
    ]
    read = read_batch(records, inline_max_bytes=2)
    stamps, _ = stamp_batch(read, findings, previous_offset=None, now=NOON)

    played = play([[decode_stamp(record.value or b"") for record in stamps]])

    assert sum(played.progress.outcomes.values()) == len(records)
    assert played.progress.next_input_offset == len(records)
    assert len(played.decoded()) <= len(records)


def test_an_event_id_is_known_for_a_window_and_in_a_number() -> None:
    """The same id again is a duplicate, until it is too old or too many others came."""
    first = make_stamp(0, None, event_id="e")
    state = reduce(None, first, RULES).state

    def outcome_at(milliseconds: int) -> str:
        stamped_at = first.stamped_at + timedelta(milliseconds=milliseconds)
        return reduce(state, make_stamp(1, 0, event_id="e", stamped_at=stamped_at), RULES).outcome

    assert [outcome_at(milliseconds) for milliseconds in (0, 8000, 8001)] == ["duplicate", "duplicate", "committed"]

    others = [make_stamp(offset, offset - 1) for offset in range(1, 1 + RULES.dedup_ids_max)]
    assert play([[first, *others[:-1], make_stamp(3, 2, event_id="e")]]).outcomes()[-1] == "duplicate"
    assert play([[first, *others, make_stamp(4, 3, event_id="e")]]).outcomes()[-1] == "committed"


@pytest.mark.parametrize("ids_max", [0, 1, 2, 5])
def test_only_so_many_event_ids_are_kept(ids_max: int) -> None:
    """The newest ids stay, oldest first; none where none are wanted."""
    stamps = [make_stamp(offset, offset - 1 if offset else None) for offset in range(5)]

    [*_, (_, change)] = play([stamps], Rules(dedup_ids_max=ids_max)).decoded()

    assert change.state is not None
    assert [event_id for event_id, _ in recent_events(change.state)] == [f"event-{at}" for at in range(5 - ids_max, 5)]


@pytest.mark.parametrize(
    ("expected_version", "attempt", "outcome"),
    [
        (2, 0, "committed"),
        (1, 0, "conflict"),
        (0, 9, "conflict"),
        (3, 0, "deferred"),
        (3, 2, "deferred"),
        (3, 3, "gave_up"),
    ],
)
def test_an_expected_version_is_kept(expected_version: int, attempt: int, outcome: str) -> None:
    """Equal commits; the past is a conflict; the future is sent in again, but not for ever."""
    stamps = [make_stamp(0, None), make_stamp(1, 0)]
    last = make_stamp(2, 1, expected_version=expected_version, attempt=attempt, original=b"{}")

    played = play([[*stamps, last]])

    assert played.outcomes()[-1] == outcome
    assert played.deferred == ([last] if outcome == "deferred" else [])
    assert played.gave_up == ([last] if outcome == "gave_up" else [])
    state = decode_change(played.store.values[URIS[0].encode()]).state
    assert state is not None
    assert state.version == (3 if outcome == "committed" else 2)


def test_an_expected_version_of_zero_means_a_new_file() -> None:
    """The first of two creators wins."""
    stamps = [make_stamp(0, None, expected_version=0), make_stamp(1, 0, expected_version=0)]
    assert play([stamps]).outcomes() == ["committed", "conflict"]


def test_an_event_from_the_future_is_no_duplicate_when_it_comes_again() -> None:
    """Only what has had its effect is remembered by its id."""
    early = make_stamp(0, None, event_id="e", expected_version=1)
    again = make_stamp(2, 1, event_id="e", expected_version=1, attempt=1)

    assert play([[early, make_stamp(1, 0), again]]).outcomes() == ["deferred", "committed", "committed"]


@pytest.mark.parametrize("op", ["deleted", "moved"])
def test_a_file_that_is_gone_has_no_content(op: str) -> None:
    """It keeps its version and its event; going twice changes nothing, coming back does."""
    gone = make_stamp(1, 0, op=op, digest=None, size=None)
    same_content = make_stamp(3, 2, digest=b"\x00" * 32)

    played = play(
        [[make_stamp(0, None), gone, replace(gone, input_offset=2, previous_offset=1, event_id="x"), same_content]]
    )

    assert played.outcomes() == ["committed", "committed", "unchanged", "committed"]
    state = played.decoded()[1][1].state
    assert state is not None
    assert (state.deleted, state.digest, state.size, state.op, state.version) == (True, None, None, op, 2)


@pytest.mark.parametrize(
    ("fields", "outcome"),
    [
        ({"op": "created", "workflow_id": "w"}, "unchanged"),
        ({"digest": b"\x09" * 32}, "committed"),
        ({"namespace": "other"}, "committed"),
        ({"metadata": b"{}"}, "committed"),
    ],
)
def test_the_same_content_again_changes_nothing(fields: dict[str, Any], outcome: str) -> None:
    """Content, namespace and metadata decide; which op said so does not."""
    again = make_stamp(1, 0, **({"digest": b"\x00" * 32} | fields))
    assert play([[make_stamp(0, None), again]]).outcomes() == ["committed", outcome]


def test_a_rejected_input_leaves_the_file_as_it_is() -> None:
    """With a uri it is told in the file's history; without one it is only counted."""
    bad = {"reason": "content_missing", "digest": None, "size": None}
    stamps = [make_stamp(0, None, **bad), make_stamp(1, 0), make_stamp(2, 1, **bad), make_stamp(3, 2, uri=None, **bad)]

    played = play([stamps])

    [unknown, committed, known] = [change for _, change in played.decoded()]
    assert (unknown.outcome, unknown.state, unknown.reason) == ("rejected", None, "content_missing")
    assert (known.outcome, known.state, known.reason) == ("rejected", committed.state, "content_missing")
    assert played.progress.outcomes["rejected"] == 3
    assert played.progress.next_input_offset == 4


@given(st.text(min_size=1, max_size=20), st.integers(0, 100), st.integers(1, 1000), st.integers(0, 10_000))
def test_a_pause_is_drawn_by_the_event_and_stays_in_its_bounds(
    event_id: str, attempt: int, base: int, more: int
) -> None:
    """The same event gets the same pause in every process: at least the base, at most the cap."""
    rules = Rules(backoff_base_ms=base, backoff_cap_ms=base + more)

    pause = backoff_ms(event_id, attempt, rules)

    assert base <= pause <= min(base + more, base * 2**attempt)
    assert pause == backoff_ms(event_id, attempt, rules)
    # Jitter: those who collided once do not come back together.
    assert attempt == 0 or more == 0 or pause != backoff_ms(event_id + "x", attempt, rules)


@given(st.lists(st.tuples(_DISTANCES, _ACCEPTED | _REJECTED.filter(lambda fields: fields["uri"])), min_size=1), _CUTS)
def test_a_tail_without_progress_is_counted(drawn: list[tuple[int, dict[str, Any]]], places: list[int]) -> None:
    """Where a writer died before its progress record, the changes themselves say how far it came.

    Only inputs without a uri, which have no change, would stay uncounted in such a tail.
    """
    head, *tail = cut(chain(drawn), places[:1])
    before, whole = play([head]), play([head, *tail])

    resumed = resume(before.store.progress, [change for _, change in whole.decoded()[len(head) :]])

    assert resumed is not None
    known = dict.fromkeys(OUTCOMES, 0) | resumed.outcomes
    assert replace(resumed, outcomes=known) == whole.progress
    assert resume(None, []) is None
