"""The records on the wire: round trips of all four, and the published JSON Schema."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import jsonschema
import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

import pipeline
from pipeline.events import (
    OUTCOMES,
    Before,
    Change,
    EventFacts,
    FileEvent,
    FileState,
    Progress,
    Stamp,
    decode_change,
    decode_event,
    decode_progress,
    decode_stamp,
    encode_event,
    encode_metadata,
    encode_record,
    json_schema,
)

pytestmark = pytest.mark.unit

SCHEMA_FILE = Path(pipeline.__file__).parent / "events.schema.json"
VALID: dict[str, Any] = {
    "event_id": "0198c2",
    "uri": "file:///data/a.bin",
    "op": "created",
    "occurred_at": "2026-11-23T09:00:00.123Z",
}
FULL: dict[str, Any] = VALID | {
    "size": 1024,
    "content": "AAEC",
    "target_uri": "file:///data/b.bin",
    "namespace": "default",
    "workflow_id": None,
    "expected_version": None,
    "source": "scan",
    "metadata": {"k": "v", "n": [1, 2.5, None, {"deep": True}]},
}

TEXT = st.text(st.characters(exclude_characters="\x00", exclude_categories=["Cs"]), min_size=1, max_size=64)
MOMENTS = st.datetimes(datetime(1, 1, 3), datetime(9999, 12, 29), timezones=st.just(UTC))  # noqa: DTZ001 - Hypothesis adds the zone
COUNTS = st.integers(0, 2**63 - 1)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=8,
)
EVENTS = st.builds(
    FileEvent,
    event_id=TEXT,
    uri=TEXT,
    op=st.sampled_from(["created", "modified", "deleted"]),
    occurred_at=MOMENTS,
    size=st.none() | COUNTS,
    content=st.none() | st.binary(max_size=50),
    target_uri=st.none() | TEXT,
    namespace=st.from_regex(r"\A[A-Za-z0-9_.-]{1,128}\Z"),
    workflow_id=st.none() | TEXT,
    expected_version=st.none() | COUNTS,
    source=st.none() | TEXT,
    metadata=st.none() | st.dictionaries(TEXT, JSON, max_size=3),
)
DIGESTS = st.binary(min_size=32, max_size=32)
STATES = st.builds(
    FileState,
    version=COUNTS,
    digest=st.none() | DIGESTS,
    size=st.none() | COUNTS,
    op=TEXT,
    deleted=st.booleans(),
    namespace=TEXT,
    occurred_at=MOMENTS,
    stamped_at=MOMENTS,
    event_id=TEXT,
    workflow_id=st.none() | TEXT,
    metadata=st.none() | st.binary(max_size=20),
    input_offset=COUNTS,
    recent=TEXT,
)


@given(EVENTS)
def test_an_event_survives_the_wire(event: FileEvent) -> None:
    """What is encoded is valid, decodes to the same, and keeps to the published schema."""
    value = encode_event(event)
    assert decode_event(event.uri.encode(), value) == event
    jsonschema.validate(msgspec.json.decode(value), json_schema())


@given(
    st.builds(
        Stamp,
        input_offset=COUNTS,
        previous_offset=st.none() | COUNTS,
        uri=st.none() | TEXT,
        event_id=st.none() | TEXT,
        op=st.none() | TEXT,
        namespace=st.none() | TEXT,
        occurred_at=st.none() | MOMENTS,
        recorded_at=MOMENTS,
        stamped_at=MOMENTS,
        digest=st.none() | DIGESTS,
        size=st.none() | COUNTS,
        reason=st.none() | TEXT,
        detail=st.none() | TEXT,
        attempt=st.integers(0, 100),
        original=st.none() | st.binary(max_size=20),
    )
)
def test_a_stamp_survives_the_wire(stamp: Stamp) -> None:
    """To the microsecond, and with every None in its place."""
    assert decode_stamp(encode_record(stamp)) == stamp


@given(
    st.builds(
        Change,
        outcome=st.sampled_from(OUTCOMES),
        input_offset=COUNTS,
        recorded_at=MOMENTS,
        state=st.none() | STATES,
        before=st.none() | st.builds(Before, st.none() | DIGESTS, st.none() | COUNTS, st.booleans()),
        event=st.none()
        | st.builds(
            EventFacts,
            event_id=st.none() | TEXT,
            op=st.none() | TEXT,
            namespace=st.none() | TEXT,
            occurred_at=st.none() | MOMENTS,
            digest=st.none() | DIGESTS,
            size=st.none() | COUNTS,
            workflow_id=st.none() | TEXT,
        ),
        reason=st.none() | TEXT,
    )
)
def test_a_change_survives_the_wire(change: Change) -> None:
    """State, what was before and the event's facts, nested."""
    assert decode_change(encode_record(change)) == change


@given(
    st.builds(
        Progress,
        next_input_offset=COUNTS,
        outcomes=st.dictionaries(st.sampled_from(OUTCOMES), COUNTS),
        repeats=COUNTS,
        strays=COUNTS,
        gaps=COUNTS,
    )
)
def test_progress_survives_the_wire(progress: Progress) -> None:
    """A count for each outcome."""
    assert decode_progress(encode_record(progress)) == progress


def test_an_old_record_still_decodes() -> None:
    """A record that ends before the newest fields gets their defaults."""
    progress = Progress(next_input_offset=5, outcomes={"committed": 5})
    assert decode_progress(msgspec.msgpack.encode([5, {"committed": 5}])) == progress


@given(st.dictionaries(TEXT, JSON, max_size=5))
def test_equal_metadata_are_equal_bytes(metadata: dict[str, Any]) -> None:
    """The order of the keys does not matter."""
    assert encode_metadata(dict(reversed(metadata.items()))) == encode_metadata(metadata)


def test_the_published_schema_is_current() -> None:
    """`pipeline/events.schema.json` says what the code does."""
    assert SCHEMA_FILE.read_text() == json.dumps(json_schema(), indent=2, sort_keys=True) + "\n", (
        "pipeline/events.schema.json is out of date: run `make schema`"
    )


@pytest.mark.parametrize("event", [VALID, FULL])
def test_samples_keep_to_the_published_schema(event: dict[str, Any]) -> None:
    """With the definition of a file event by its name, as a producer uses it."""
    schema = json.loads(SCHEMA_FILE.read_text())
    jsonschema.Draft202012Validator.check_schema(schema)
    jsonschema.validate(event, {"$ref": "#/$defs/FileEvent", "$defs": schema["$defs"]})


@pytest.mark.parametrize(
    "changes", [{"op": "touched"}, {"uri": ""}, {"namespace": "a b"}, {"namespace": "a\n"}, {"size": -1}, {"uri": 1}]
)
def test_the_published_schema_refuses_what_we_refuse(changes: dict[str, Any]) -> None:
    """A producer that validates with it hears of a mistake before it sends."""
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(VALID | changes, json.loads(SCHEMA_FILE.read_text()))
