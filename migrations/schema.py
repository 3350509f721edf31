"""The tables of stampline as SQLAlchemy sees them: a description, for autogenerate and for the test that compares.

Views, functions, partitions and the reader role are not described here; they are written out in `migrations/versions`.
No code reads or writes rows through this description.
"""

from __future__ import annotations

import re
from typing import Final

from sqlalchemy import (
    BigInteger,
    Boolean,
    CheckConstraint,
    Column,
    DateTime,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    PrimaryKeyConstraint,
    Table,
    Text,
    text,
)
from sqlalchemy.dialects.postgresql import JSONB, UUID

#: The schema that holds the tables; the views of the contract live in `public`.
SCHEMA: Final = "stampline"

#: The names of the monthly partitions, which are made by `stampline.ensure_history_partitions`.
HISTORY_PARTITION: Final = re.compile(r"file_history_\d{4,}_\d{2}")

_INSTANT: Final = DateTime(timezone=True)

metadata = MetaData(
    schema=SCHEMA,
    naming_convention={
        "pk": "pk_%(table_name)s",
        "ix": "ix_%(table_name)s_%(column_0_N_name)s",
        "uq": "uq_%(table_name)s_%(column_0_N_name)s",
        "ck": "ck_%(table_name)s_%(constraint_name)s",
        "fk": "fk_%(table_name)s_%(column_0_N_name)s",
    },
)

files = Table(
    "files",
    metadata,
    Column("uri_key", UUID, nullable=False),
    Column("version", BigInteger, nullable=False),
    Column("size", BigInteger),
    Column("occurred_at", _INSTANT, nullable=False),
    Column("stamped_at", _INSTANT, nullable=False),
    Column("projected_at", _INSTANT, nullable=False),
    Column("input_offset", BigInteger, nullable=False),
    Column("input_partition", Integer, nullable=False),
    Column("deleted", Boolean, nullable=False),
    Column("uri", Text, nullable=False),
    Column("namespace", Text, nullable=False),
    Column("op", Text, nullable=False),
    Column("event_id", Text, nullable=False),
    Column("digest", LargeBinary),
    Column("workflow_id", Text),
    Column("metadata", JSONB),
    PrimaryKeyConstraint("uri_key"),
    CheckConstraint("octet_length(digest) = 32", name="digest_bytes"),
    # A uri may be longer than a btree entry, hence the key of 16 bytes and a hash index for look-ups by the uri.
    Index(None, "uri", postgresql_using="hash"),
    # For look-ups by what the view shows, and for the examples in `duplicates`.
    Index("ix_files_digest", text("encode(digest, 'hex'::text)"), postgresql_using="hash"),
    # An update that leaves the digest alone changes no indexed column and stays on its page where there is room (HOT).
    postgresql_with={"fillfactor": 80},
)

file_history = Table(
    "file_history",
    metadata,
    Column("input_offset", BigInteger, nullable=False),
    Column("version", BigInteger),
    Column("size", BigInteger),
    Column("occurred_at", _INSTANT),
    Column("recorded_at", _INSTANT, nullable=False),
    Column("projected_at", _INSTANT, nullable=False),
    Column("input_partition", Integer, nullable=False),
    Column("uri", Text, nullable=False),
    Column("namespace", Text),
    Column("event_id", Text),
    Column("op", Text),
    Column("outcome", Text, nullable=False),
    Column("reason", Text),
    Column("digest", LargeBinary),
    CheckConstraint("octet_length(digest) = 32", name="digest_bytes"),
    # A unique index has to hold the partition key; across months the watermark keeps the offsets unique.
    Index("ix_file_history_input", "input_partition", "input_offset", "projected_at", unique=True),
    Index(None, "uri", postgresql_using="hash"),
    # By our own clock: producers' clocks are arbitrary, and partitions have to be made ahead.
    postgresql_partition_by="RANGE (projected_at)",
)

watermarks = Table(
    "watermarks",
    metadata,
    Column("feed_offset", BigInteger, nullable=False),
    # Null where the feed is not one of file events: the dead letters'.
    Column("input_offset", BigInteger),
    Column("event_time", _INSTANT),
    Column("updated_at", _INSTANT, nullable=False),
    Column("heartbeat_at", _INSTANT, nullable=False),
    Column("partition", Integer, nullable=False),
    Column("projection", Text, nullable=False),
    Column("owner", Text, nullable=False),
    # Where the feed ended when the projector last looked, and when it last had projected all of it.
    Column("feed_end", BigInteger, nullable=False, server_default=text("0")),
    Column("caught_up_at", _INSTANT),
    PrimaryKeyConstraint("projection", "partition"),
    # A few rows that are updated with every batch: much room for new versions on the page.
    postgresql_with={"fillfactor": 10},
)

contents = Table(
    "contents",
    metadata,
    Column("size", BigInteger, nullable=False),
    Column("copies", BigInteger, nullable=False),
    Column("first_seen_at", _INSTANT, nullable=False),
    Column("last_seen_at", _INSTANT, nullable=False),
    Column("digest", LargeBinary, nullable=False),
    PrimaryKeyConstraint("digest"),
    CheckConstraint("octet_length(digest) = 32", name="digest_bytes"),
    Index(
        "ix_contents_wasted_bytes",
        text("(size * (copies - 1)) DESC"),
        "digest",
        postgresql_where=text("copies > 1"),
    ),
    postgresql_with={"fillfactor": 80},
)

activity = Table(
    "activity",
    metadata,
    Column("minute", _INSTANT, nullable=False),
    Column("events", BigInteger, nullable=False),
    Column("bytes", BigInteger, nullable=False),
    Column("committed", BigInteger, nullable=False),
    Column("unchanged", BigInteger, nullable=False),
    Column("duplicate", BigInteger, nullable=False),
    Column("conflict", BigInteger, nullable=False),
    Column("deferred", BigInteger, nullable=False),
    Column("gave_up", BigInteger, nullable=False),
    Column("rejected", BigInteger, nullable=False),
    # A row for each partition, so that no two projectors ever write the same one.
    Column("input_partition", Integer, nullable=False),
    # Empty where the event told none.
    Column("namespace", Text, nullable=False),
    Column("op", Text, nullable=False),
    PrimaryKeyConstraint("minute", "namespace", "op", "input_partition"),
    postgresql_with={"fillfactor": 80},
)

dead_letters = Table(
    "dead_letters",
    metadata,
    Column("offset", BigInteger, nullable=False),
    Column("dead_at", _INSTANT, nullable=False),
    # Where the letter itself stands in the topic of dead letters, in the partition of the original.
    Column("letter_offset", BigInteger, nullable=False),
    Column("partition", Integer, nullable=False),
    Column("attempts", Integer, nullable=False),
    Column("topic", Text, nullable=False),
    Column("reason", Text, nullable=False),
    Column("error", Text, nullable=False),
    Column("status", Text, nullable=False),
    # The key as text that a person can read, and as it came.
    Column("key", Text),
    Column("key_bytes", LargeBinary),
    Column("payload", LargeBinary),
    Column("headers", JSONB, nullable=False),
    PrimaryKeyConstraint("topic", "partition", "offset"),
    CheckConstraint("status IN ('open', 'replayed', 'dropped')", name="status"),
    Index(None, "dead_at"),
)

# Up to where the history of each partition was dropped by age.
dropped_history = Table(
    "dropped_history",
    metadata,
    Column("next_input_offset", BigInteger, nullable=False),
    Column("input_partition", Integer, nullable=False),
    PrimaryKeyConstraint("input_partition"),
)
