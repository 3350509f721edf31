"""Tables of the files, their history and the watermarks, the views on them, and the reader role."""

from __future__ import annotations

from alembic import op

revision = "0001"
down_revision = None

_TABLES = """
CREATE TABLE stampline.files (
    uri_key uuid NOT NULL,
    version bigint NOT NULL,
    size bigint,
    occurred_at timestamptz NOT NULL,
    stamped_at timestamptz NOT NULL,
    projected_at timestamptz NOT NULL,
    input_offset bigint NOT NULL,
    input_partition integer NOT NULL,
    deleted boolean NOT NULL,
    uri text NOT NULL,
    namespace text NOT NULL,
    op text NOT NULL,
    event_id text NOT NULL,
    digest bytea,
    workflow_id text,
    metadata jsonb,
    CONSTRAINT pk_files PRIMARY KEY (uri_key),
    CONSTRAINT ck_files_digest_bytes CHECK (octet_length(digest) = 32)
) WITH (fillfactor = 80);
CREATE INDEX ix_files_uri ON stampline.files USING hash (uri);

CREATE TABLE stampline.file_history (
    input_offset bigint NOT NULL,
    version bigint,
    size bigint,
    occurred_at timestamptz,
    recorded_at timestamptz NOT NULL,
    projected_at timestamptz NOT NULL,
    input_partition integer NOT NULL,
    uri text NOT NULL,
    namespace text,
    event_id text,
    op text,
    outcome text NOT NULL,
    reason text,
    digest bytea,
    CONSTRAINT ck_file_history_digest_bytes CHECK (octet_length(digest) = 32)
) PARTITION BY RANGE (projected_at);
CREATE UNIQUE INDEX ix_file_history_input ON stampline.file_history (input_partition, input_offset, projected_at);
CREATE INDEX ix_file_history_uri ON stampline.file_history USING hash (uri);

CREATE TABLE stampline.watermarks (
    feed_offset bigint NOT NULL,
    input_offset bigint NOT NULL,
    event_time timestamptz,
    updated_at timestamptz NOT NULL,
    heartbeat_at timestamptz NOT NULL,
    partition integer NOT NULL,
    projection text NOT NULL,
    owner text NOT NULL,
    CONSTRAINT pk_watermarks PRIMARY KEY (projection, partition)
) WITH (fillfactor = 10);
"""

# The new table is attached, not made as a partition: that would take a lock on the history which every reader and
# writer is in the way of, and attaching takes one that is in nobody's way. The advisory lock is for two projectors
# that come at the same time; the second finds the table.
_ENSURE_HISTORY_PARTITIONS = """
CREATE FUNCTION stampline.ensure_history_partitions(at timestamptz) RETURNS void
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $function$
DECLARE
    this_month CONSTANT timestamp := date_trunc('month', at AT TIME ZONE 'UTC');
    first_day timestamp;
    name text;
BEGIN
    FOR ahead IN 0..1 LOOP
        first_day := this_month + make_interval(months => ahead);
        name := 'file_history_' || to_char(first_day, 'YYYY_MM');
        CONTINUE WHEN to_regclass('stampline.' || name) IS NOT NULL;
        PERFORM pg_advisory_xact_lock(hashtextextended('stampline.file_history', 0));
        -- By a query, for to_regclass remembers what it did not find before the lock.
        CONTINUE WHEN EXISTS (
            SELECT FROM pg_class WHERE relnamespace = 'stampline'::regnamespace AND relname = name
        );
        EXECUTE format('CREATE TABLE stampline.%I (LIKE stampline.file_history INCLUDING ALL)', name);
        EXECUTE format(
            'ALTER TABLE stampline.file_history ATTACH PARTITION stampline.%I FOR VALUES FROM (%L) TO (%L)',
            name,
            to_char(first_day, 'YYYY-MM-DD "00:00:00+00"'),
            to_char(first_day + interval '1 month', 'YYYY-MM-DD "00:00:00+00"')
        );
    END LOOP;
END
$function$
"""

_VIEWS = """
CREATE VIEW public.files AS
SELECT uri, namespace, encode(digest, 'hex') AS digest, size, version, op, deleted, occurred_at, stamped_at,
       projected_at, event_id, workflow_id, metadata, input_partition, input_offset
FROM stampline.files;

CREATE VIEW public.file_history AS
SELECT input_partition, input_offset, uri, namespace, event_id, op, outcome, version, encode(digest, 'hex') AS digest,
       size, occurred_at, recorded_at, projected_at, reason
FROM stampline.file_history;

CREATE VIEW public.projection_watermarks AS
SELECT projection, partition, feed_offset, input_offset, event_time, updated_at, heartbeat_at, owner
FROM stampline.watermarks;
"""

# Roles belong to the whole cluster: another database may have made this one already, or be making it right now.
_CREATE_READER = """
DO $do$
BEGIN
    IF NOT EXISTS (SELECT FROM pg_roles WHERE rolname = 'stampline_reader') THEN
        CREATE ROLE stampline_reader NOLOGIN;
    END IF;
EXCEPTION
    WHEN duplicate_object OR unique_violation THEN NULL;
    WHEN insufficient_privilege THEN
        RAISE insufficient_privilege USING MESSAGE =
            'role stampline_reader is missing and this user may not create it: have an administrator run '
            'CREATE ROLE stampline_reader NOLOGIN';
END
$do$
"""
_GRANT_READER = """
GRANT USAGE ON SCHEMA public TO stampline_reader;
GRANT SELECT ON public.files, public.file_history, public.projection_watermarks TO stampline_reader;
"""

# The role stays where another database grants it something, or where it is not ours to drop.
_DROP_READER = """
DO $do$
BEGIN
    DROP ROLE IF EXISTS stampline_reader;
EXCEPTION
    WHEN dependent_objects_still_exist OR insufficient_privilege OR object_in_use THEN NULL;
END
$do$
"""


def upgrade() -> None:
    """Make the tables, the partitions of this month and the next, the views, and the reader."""
    _execute(_TABLES)
    op.execute(_ENSURE_HISTORY_PARTITIONS)
    op.execute("SELECT stampline.ensure_history_partitions(now())")
    _execute(_VIEWS)
    op.execute(_CREATE_READER)
    _execute(_GRANT_READER)


def downgrade() -> None:
    """Drop all of it; the empty schema stays, for it holds the version table."""
    op.execute("DROP VIEW public.projection_watermarks, public.file_history, public.files")
    op.execute("DROP FUNCTION stampline.ensure_history_partitions(timestamptz)")
    op.execute("DROP TABLE stampline.watermarks, stampline.file_history, stampline.files")
    op.execute("REVOKE USAGE ON SCHEMA public FROM stampline_reader")
    op.execute(_DROP_READER)


def _execute(script: str) -> None:
    """Run each statement of `script`: the driver prepares statements, and prepares one at a time."""
    for statement in script.split(";\n"):
        if statement.strip():
            op.execute(statement)
