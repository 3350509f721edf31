"""What `decode_event` takes and refuses, and what `sketch_event` tells of a rejected one."""

from __future__ import annotations

import base64
import json
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

import pipeline
from pipeline.errors import InputRejected
from pipeline.events import (
    METADATA_LEVELS_MAX,
    METADATA_MAX_BYTES,
    PROGRESS_KEY,
    RECORD_MAX_BYTES,
    URI_MAX_BYTES,
    FileEvent,
    decode_event,
    encode_metadata,
    sketch_event,
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
    "content": base64.b64encode(bytes(range(256))).decode(),
    "target_uri": "file:///data/b.bin",
    "namespace": "default",
    "workflow_id": None,
    "expected_version": None,
    "source": "scan",
    "metadata": {"k": "v", "n": [1, 2.5, None, {"deep": True}]},
}

TEXT = st.text(st.characters(exclude_characters="\x00", exclude_categories=["Cs"]), min_size=1, max_size=64)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=8,
)


def _value(**changes: Any) -> bytes:
    return json.dumps(VALID | changes).encode()


def _decode(value: bytes, key: bytes = b"file:///data/a.bin") -> FileEvent:
    return decode_event(key, value)


def _rejection(value: bytes | None, key: bytes | None = b"file:///data/a.bin") -> InputRejected:
    with pytest.raises(InputRejected) as caught:
        decode_event(key, value)
    return caught.value


def _verdict(key: bytes | None, value: bytes) -> str:
    try:
        decode_event(key, value)
    except InputRejected as rejection:
        return rejection.reason
    return "event"


def test_the_smallest_event_has_four_fields() -> None:
    """Everything else has a default."""
    event = _decode(_value())
    assert event == FileEvent(
        event_id="0198c2",
        uri="file:///data/a.bin",
        op="created",
        occurred_at=datetime(2026, 11, 23, 9, 0, 0, 123000, UTC),
    )
    assert event.namespace == "default"


def test_every_field_arrives() -> None:
    """The sample of the contract, with all its fields."""
    event = _decode(json.dumps(FULL).encode())
    assert event.content == bytes(range(256))
    assert (event.size, event.source, event.metadata) == (1024, "scan", FULL["metadata"])


def test_an_unknown_field_is_no_error() -> None:
    """A newer producer may say more than we know."""
    assert _decode(_value(colour={"red": [1]})) == _decode(_value())


def test_a_zone_is_kept_as_a_moment() -> None:
    """An offset other than Z names the same instant."""
    event = _decode(_value(occurred_at="2026-11-23T11:00:00+02:00"))
    assert event.occurred_at == datetime(2026, 11, 23, 11, tzinfo=timezone(timedelta(hours=2)))


@pytest.mark.parametrize("field", ["event_id", "uri", "op", "occurred_at"])
def test_a_missing_field_is_named(field: str) -> None:
    """The four required fields, one at a time."""
    value = json.dumps({name: text for name, text in VALID.items() if name != field}).encode()
    rejection = _rejection(value)
    assert rejection.reason == "invalid_event"
    assert field in rejection.detail


@pytest.mark.parametrize(
    ("field", "bad"),
    [
        ("event_id", ""),
        ("event_id", "x" * 257),
        ("event_id", 7),
        ("uri", ""),
        ("uri", "x" * (URI_MAX_BYTES + 1)),
        ("uri", "é" * (URI_MAX_BYTES // 2 + 1)),
        ("uri", None),
        ("op", "touched"),
        ("occurred_at", "2026-11-23T09:00:00"),
        ("occurred_at", "yesterday"),
        ("occurred_at", "2026-02-30T00:00:00Z"),
        ("occurred_at", "0001-01-01T00:00:00+23:59"),
        ("occurred_at", "9999-12-31T23:59:59-23:59"),
        ("occurred_at", 1763888400),
        ("size", -1),
        ("size", 2**63),
        ("size", 1.5),
        ("content", "%%%"),
        ("target_uri", ""),
        ("namespace", "a b"),
        ("namespace", ""),
        ("namespace", "x" * 129),
        ("namespace", "newline\n"),
        ("workflow_id", ""),
        ("expected_version", -1),
        ("source", []),
        ("metadata", "text"),
        ("metadata", {"k": "x" * METADATA_MAX_BYTES}),
    ],
)
def test_a_bad_field_is_named(field: str, bad: Any) -> None:
    """The detail names the field by its path, so that its producer can find it."""
    rejection = _rejection(_value(**{field: bad}), key=str(bad).encode() if field == "uri" else b"file:///data/a.bin")
    assert rejection.reason == "invalid_event"
    # The decoder writes a regular expression without its path, for a field of a pattern of its own.
    assert f"$.{field}" in rejection.detail or field == "namespace"


def test_the_largest_values_are_taken() -> None:
    """Each bound is inclusive."""
    uri = "u" * URI_MAX_BYTES
    metadata = {"k": "x" * (METADATA_MAX_BYTES - len(b'{"k":""}'))}
    event = _decode(
        _value(uri=uri, event_id="e" * 256, namespace="n" * 128, size=2**63 - 1, metadata=metadata), key=uri.encode()
    )
    assert len(encode_metadata(event.metadata or {})) == METADATA_MAX_BYTES


def test_a_move_needs_a_target() -> None:
    """Or nobody knows where the file went."""
    assert "target_uri" in _rejection(_value(op="moved")).detail
    assert _decode(_value(op="moved", target_uri="file:///b")).target_uri == "file:///b"


@pytest.mark.parametrize(
    "changes",
    [
        {"uri": "file:///a\x00"},
        {"event_id": "\x00"},
        {"source": "a\x00b"},
        {"metadata": {"k\x00": 1}},
        {"metadata": {"k": [{"deep": "\x00"}]}},
        {"unknown": "\x00"},
    ],
)
def test_nul_is_refused_anywhere(changes: dict[str, Any]) -> None:
    """PostgreSQL cannot hold it, in text or in jsonb."""
    rejection = _rejection(_value(**changes))
    assert (rejection.reason, "NUL" in rejection.detail) == ("invalid_event", True)


def test_a_backslash_before_u0000_is_no_nul() -> None:
    """The text of an escape is text."""
    assert _decode(_value(source="\\u0000")).source == "\\u0000"


def test_content_may_hold_nul() -> None:
    """Content is bytes, not text."""
    assert _decode(_value(content="AAAA")).content == b"\x00\x00\x00"


def test_a_record_too_large_is_not_even_decoded() -> None:
    """The bound is on the record's value as it came."""
    fits = _value(unknown="")
    fits = fits[:-2] + b"x" * (RECORD_MAX_BYTES - len(fits)) + fits[-2:]
    assert len(fits) == RECORD_MAX_BYTES
    assert _decode(fits).event_id == "0198c2"
    rejection = _rejection(fits[:-2] + b"x" + fits[-2:])
    assert rejection.reason == "too_large"
    assert str(RECORD_MAX_BYTES) in rejection.detail


@pytest.mark.parametrize("key", [None, b"", b"file:///data/b.bin", b"FILE:///data/a.bin", b"\xff"])
def test_the_key_must_be_the_uri(key: bytes | None) -> None:
    """The key decides the partition, and with it the one writer of the file."""
    assert _rejection(_value(), key=key).reason == "wrong_key"


@pytest.mark.parametrize(
    "value",
    [
        None,
        b"",
        b"{",
        b"\xff\xfe",
        b"\xef\xbb\xbf{}",
        b'{"event_id": "\xff", "uri": "u"}',
        b'{"event_id": "\\ud800", "uri": "u"}',
        b'{"metadata": {"k": "\xed\xa0\x80"}}',
        b'{"uri": "raw\x00nul"}',
        b'{"a":' * 100_000,
    ],
)
def test_what_is_no_json_in_utf8_is_undecodable(value: bytes | None) -> None:
    """Broken JSON, broken UTF-8, lone surrogates and bottomless nesting all get the same reason."""
    assert _rejection(value).reason == "undecodable"
    assert sketch_event(value) in ({}, {"uri": "u"})


@pytest.mark.parametrize("value", [b"null", b"[]", b"1", b'"text"', b"{}"])
def test_json_that_is_no_event_is_invalid(value: bytes) -> None:
    """It can be decoded, so its sender hears what is missing."""
    assert _rejection(value).reason == "invalid_event"


def test_nesting_of_metadata_is_bounded() -> None:
    """The verdict does not depend on the stack of the process that decodes."""

    def nested(levels: int) -> dict[str, Any]:
        inner: Any = 1
        for _ in range(levels - 1):
            inner = [inner]
        return {"k": inner}

    assert _decode(_value(metadata=nested(METADATA_LEVELS_MAX))).metadata is not None
    for levels in (METADATA_LEVELS_MAX + 1, 900):
        assert "$.metadata" in _rejection(_value(metadata=nested(levels))).detail


@given(st.binary(max_size=200), st.none() | st.binary(max_size=20))
@example(b'{"namespace":"\xff"}', None)
def test_arbitrary_bytes_are_an_event_or_rejected(value: bytes, key: bytes | None) -> None:
    """No other exception ever comes out, and a sketch never fails."""
    assert _verdict(key, value) in {"event", "undecodable", "invalid_event", "wrong_key", "too_large"}
    assert isinstance(sketch_event(value), dict)


@given(st.data())
def test_a_damaged_event_is_an_event_or_rejected(data: st.DataObject) -> None:
    """Bytes overwritten at any place of a valid event lead to nothing but a rejection."""
    value = bytearray(json.dumps(FULL).encode())
    for _ in range(data.draw(st.integers(1, 3))):
        place = data.draw(st.integers(0, len(value) - 1))
        value[place : place + data.draw(st.integers(0, 2))] = data.draw(st.binary(max_size=3))
    assert _verdict(b"file:///data/a.bin", bytes(value)) in {"event", "undecodable", "invalid_event", "wrong_key"}
    assert isinstance(sketch_event(bytes(value)), dict)


@given(st.dictionaries(st.sampled_from(["uri", "event_id", "op", "namespace", "other"]), JSON, max_size=5))
def test_a_sketch_tells_usable_text_only(fields: dict[str, Any]) -> None:
    """Whatever the fields hold, what is told is non-empty text without NUL that PostgreSQL can store."""
    sketch = sketch_event(json.dumps(fields).encode())
    assert sketch.keys() <= fields.keys() - {"other"}
    for name, text in sketch.items():
        assert text == fields[name]
        assert text
        assert "\x00" not in text


def test_a_sketch_keeps_what_is_good() -> None:
    """One bad field does not take the others along; too long or with NUL counts as bad."""
    value = json.dumps({"uri": "file:///a", "event_id": "x" * 257, "op": 5, "namespace": "n\x00"}).encode()
    assert sketch_event(value) == {"uri": "file:///a"}
    assert sketch_event(json.dumps({"uri": "é" * (URI_MAX_BYTES // 2 + 1)}).encode()) == {}


def test_no_uri_can_be_the_progress_key() -> None:
    """A file that took the reserved key would overwrite the progress record."""
    assert _rejection(json.dumps(VALID | {"uri": PROGRESS_KEY.decode()}).encode(), key=PROGRESS_KEY).detail.startswith(
        "NUL"
    )
