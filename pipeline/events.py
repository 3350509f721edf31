"""The wire schema: what a file event, a stamp, a change and a progress record look like.

`FileEvent` is JSON, for producers of every language. `Stamp`, `Change` and `Progress` travel between our own
hops only and are msgpack arrays (a change is 40 % of its size as JSON and half the time). A field is only
ever added at the end, with a default, so that an old record still decodes.

Pure: imports neither faust, asyncio, asyncpg nor os.
"""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Annotated, Any, Final, Literal

import msgspec
from msgspec import Meta, Struct

from pipeline.errors import InputRejected

#: Bounds of the contract; every one is checked by `decode_event`.
URI_MAX_BYTES: Final = 4096
METADATA_MAX_BYTES: Final = 8 * 1024
#: Without it the verdict on deep nesting would depend on how deep the stack is that decodes it.
METADATA_LEVELS_MAX: Final = 32
RECORD_MAX_BYTES: Final = 1024 * 1024

#: The key of a progress record. A uri cannot contain NUL, so no file can have this key.
PROGRESS_KEY: Final = b"\x00progress"

#: Header of `file-events` that counts how often the retry role has sent the event in again.
ATTEMPT_HEADER: Final = "stampline-attempt"

_INT64_MAX: Final = 2**63 - 1
# PostgreSQL and Python agree on the years between in every time zone.
_EARLIEST: Final = datetime(1, 1, 2, tzinfo=UTC)
_LATEST: Final = datetime(9999, 12, 30, tzinfo=UTC)
Op = Literal["created", "modified", "deleted", "moved"]
#: After these the file at the event's uri is not there any more, and no content is needed.
GONE_OPS: Final = frozenset({"deleted", "moved"})
Outcome = Literal["committed", "unchanged", "duplicate", "conflict", "deferred", "gave_up", "rejected"]
OUTCOMES: Final[tuple[Outcome, ...]] = (
    "committed",
    "unchanged",
    "duplicate",
    "conflict",
    "deferred",
    "gave_up",
    "rejected",
)

Text = Annotated[str, Meta(min_length=1, max_length=256)]
Uri = Annotated[str, Meta(min_length=1, max_length=URI_MAX_BYTES)]
# `$` would let a trailing newline through; "no character follows" is the same in Python and in JSON Schema.
Namespace = Annotated[str, Meta(pattern=r"^[A-Za-z0-9_.-]{1,128}(?![\s\S])")]
Instant = Annotated[datetime, Meta(tz=True, extra_json_schema={"format": "date-time"})]
Count = Annotated[int, Meta(ge=0, le=_INT64_MAX)]


class FileEvent(Struct, frozen=True, kw_only=True, gc=False, omit_defaults=True):
    """Something happened to one file: the native input, JSON on `file-events` with the uri as key.

    `content` is the file's bytes (base64 in JSON); without it the content is fetched by the uri's scheme.
    `deleted` and `moved` need no content: the file at `uri` is gone, and what arrived at `target_uri` is an event
    of its own, because it may live in another partition.
    """

    event_id: Text
    uri: Uri
    op: Op
    occurred_at: Instant
    size: Count | None = None
    content: bytes | None = None
    target_uri: Uri | None = None
    namespace: Namespace = "default"
    workflow_id: Text | None = None
    expected_version: Count | None = None
    source: Text | None = None
    metadata: dict[str, Any] | None = None


class Stamp(Struct, frozen=True, kw_only=True, gc=False, array_like=True):
    """What the hasher found out about one input; there is exactly one stamp for each.

    `previous_offset` chains the inputs: the offset of the record before this one in `file-events`, or None where a
    hasher starts a new chain. A rejected input has a `reason`, and a `uri` only if one could be read.
    `recorded_at` is when Kafka got the event, `stamped_at` when it was hashed. `original` is the record's value,
    kept only where the event may have to be sent in again.
    """

    input_offset: int
    previous_offset: int | None
    uri: str | None
    event_id: str | None
    op: str | None
    namespace: str | None
    occurred_at: datetime | None
    recorded_at: datetime
    stamped_at: datetime
    digest: bytes | None = None
    size: int | None = None
    reason: str | None = None
    detail: str | None = None
    workflow_id: str | None = None
    expected_version: int | None = None
    metadata: bytes | None = None
    attempt: int = 0
    original: bytes | None = None


class FileState(Struct, frozen=True, kw_only=True, gc=False, array_like=True):
    """The current state of one file: the value of table `files`.

    `recent` holds the newest event ids and when each was stamped, in ms since 1970, oldest first: `id NUL ms NUL …`. It
    is one text and not a list, because most readers of a change only pass it on; `recent_events` takes it apart.
    """

    version: int
    digest: bytes | None
    size: int | None
    op: str
    deleted: bool
    namespace: str
    occurred_at: datetime
    stamped_at: datetime
    event_id: str
    workflow_id: str | None
    metadata: bytes | None
    input_offset: int
    recent: str = ""


def recent_events(state: FileState) -> list[tuple[str, int]]:
    """Return the event ids that a state remembers, with when each was stamped, oldest first."""
    parts = state.recent.split("\0")
    return [(event_id, int(ms)) for event_id, ms in zip(parts[:-1:2], parts[1::2], strict=True)]


class Before(Struct, frozen=True, gc=False, array_like=True):
    """What a change replaced: all that an additive projection needs to subtract."""

    digest: bytes | None
    size: int | None
    deleted: bool


class EventFacts(Struct, frozen=True, kw_only=True, gc=False, array_like=True):
    """What the event itself said, where it did not become the state."""

    event_id: str | None
    op: str | None
    namespace: str | None
    occurred_at: datetime | None
    digest: bytes | None
    size: int | None
    workflow_id: str | None


class Change(Struct, frozen=True, kw_only=True, gc=False, array_like=True):
    """One record of the changelog of `files`: one input's outcome, with the state after it.

    `state` is None only where a rejected input named a file that was never known. `event` is None where the
    outcome is `committed`: the state then says all of it.
    """

    outcome: Outcome
    input_offset: int
    recorded_at: datetime
    state: FileState | None
    before: Before | None = None
    event: EventFacts | None = None
    reason: str | None = None


class Progress(Struct, frozen=True, kw_only=True, gc=False, array_like=True):
    """The last record of each transaction of the reducer: how far it has come in `file-events`.

    `outcomes` counts every input of the partition since its beginning, so that it can be proved that none was lost.
    `repeats` and `strays` count stamps that were dropped because they did not continue the chain; `gaps` counts the
    new chains that left inputs out.
    """

    next_input_offset: int
    outcomes: dict[Outcome, int]
    repeats: int = 0
    strays: int = 0
    gaps: int = 0


class _Sketch(Struct, frozen=True, gc=False):
    """The fields of a rejected event that are worth telling, whatever they hold."""

    uri: Any = None
    event_id: Any = None
    op: Any = None
    namespace: Any = None


# The decoder lets Python's own error through where a string is not UTF-8.
_UNDECODABLE: Final = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)

_event_decoder = msgspec.json.Decoder(FileEvent)
_sketch_decoder = msgspec.json.Decoder(_Sketch)
_any_decoder = msgspec.json.Decoder()
_json_encoder = msgspec.json.Encoder()
_msgpack_encoder = msgspec.msgpack.Encoder()

encode_event = _json_encoder.encode
encode_record = _msgpack_encoder.encode
decode_stamp = msgspec.msgpack.Decoder(Stamp).decode
decode_change = msgspec.msgpack.Decoder(Change).decode
decode_progress = msgspec.msgpack.Decoder(Progress).decode


def decode_event(key: bytes | None, value: bytes | None) -> FileEvent:
    """Decode and validate one record of `file-events`.

    Raises:
        InputRejected: `too_large`, `undecodable`, `invalid_event` (names the field) or `wrong_key`.
    """
    if value is None:
        raise InputRejected("undecodable", "the record has no value; a file event is a JSON object")
    if len(value) > RECORD_MAX_BYTES:
        raise InputRejected("too_large", f"the record has {len(value)} bytes, the most is {RECORD_MAX_BYTES}")
    try:
        event = _event_decoder.decode(value)
        # One byte is found faster than six, and most events have no backslash at all.
        has_nul = b"\\" in value and b"\\u0000" in value and _contains_nul(_any_decoder.decode(value))
    except msgspec.ValidationError as exc:
        raise InputRejected("invalid_event", str(exc)) from exc
    except _UNDECODABLE as exc:
        raise InputRejected("undecodable", f"not a JSON object in UTF-8: {exc}") from exc
    if has_nul:
        raise InputRejected("invalid_event", "NUL is not allowed anywhere in an event")
    _check_relations(event)
    if key != event.uri.encode():
        raise InputRejected("wrong_key", "the record's key is not its uri in UTF-8; the key decides the partition")
    return event


def _check_relations(event: FileEvent) -> None:
    if len(event.uri) * 4 > URI_MAX_BYTES and len(event.uri.encode()) > URI_MAX_BYTES:
        raise InputRejected("invalid_event", f"Expected at most {URI_MAX_BYTES} bytes of UTF-8 - at `$.uri`")
    if event.op == "moved" and event.target_uri is None:
        raise InputRejected("invalid_event", "op `moved` needs `$.target_uri`")
    if event.metadata:
        if _is_deeper(event.metadata, METADATA_LEVELS_MAX):
            raise InputRejected("invalid_event", f"Expected at most {METADATA_LEVELS_MAX} levels - at `$.metadata`")
        if len(encode_metadata(event.metadata)) > METADATA_MAX_BYTES:
            detail = f"Expected at most {METADATA_MAX_BYTES} bytes of JSON - at `$.metadata`"
            raise InputRejected("invalid_event", detail)
    if not _EARLIEST < event.occurred_at < _LATEST:
        raise InputRejected("invalid_event", "Expected a year from 1 to 9999 - at `$.occurred_at`")


def _is_deeper(value: Any, levels: int) -> bool:
    """Tell whether a decoded JSON value is nested more than `levels` deep, without recursion."""
    layer = [value]
    for _ in range(levels):
        layer = [
            child
            for item in layer
            for child in (item.values() if isinstance(item, dict) else item if isinstance(item, list) else ())
        ]
        if not layer:
            return False
    return any(isinstance(item, (dict, list)) for item in layer)


def _contains_nul(value: Any) -> bool:
    """Tell whether any string inside a decoded JSON value holds a NUL."""
    pending = [value]
    while pending:
        item = pending.pop()
        if isinstance(item, str):
            if "\x00" in item:
                return True
        elif isinstance(item, dict):
            pending.extend(item.keys())
            pending.extend(item.values())
        elif isinstance(item, list):
            pending.extend(item)
    return False


def encode_metadata(metadata: dict[str, Any]) -> bytes:
    """Encode metadata as JSON with sorted keys, so that equal metadata are equal bytes."""
    return msgspec.json.encode(metadata, order="sorted")


def sketch_event(value: bytes | None) -> dict[str, str]:
    """Read what can be read of a rejected event: those of uri, event_id, op and namespace that are usable text."""
    try:
        sketch = _sketch_decoder.decode(value or b"")
    except _UNDECODABLE:
        return {}
    told = {name: getattr(sketch, name) for name in _Sketch.__struct_fields__}
    limits = {"uri": URI_MAX_BYTES}
    return {
        name: text
        for name, text in told.items()
        if isinstance(text, str) and text and "\x00" not in text and len(text.encode()) <= limits.get(name, 256)
    }


def json_schema() -> dict[str, Any]:
    """Return the JSON Schema of all four records, as committed in `pipeline/events.schema.json`."""
    (_, components) = msgspec.json.schema_components(
        [FileEvent, Stamp, Change, Progress], ref_template="#/$defs/{name}"
    )
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "stampline records",
        "$ref": "#/$defs/FileEvent",
        "$defs": components,
    }
