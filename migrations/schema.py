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
    # No update changes an indexed column, so with room on the page every update stays on it (HOT).
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
    Column("input_offset", BigInteger, nullable=False),
    Column("event_time", _INSTANT),
    Column("updated_at", _INSTANT, nullable=False),
    Column("heartbeat_at", _INSTANT, nullable=False),
    Column("partition", Integer, nullable=False),
    Column("projection", Text, nullable=False),
    Column("owner", Text, nullable=False),
    PrimaryKeyConstraint("projection", "partition"),
    # A few rows that are updated with every batch: much room for new versions on the page.
    postgresql_with={"fillfactor": 10},
)
