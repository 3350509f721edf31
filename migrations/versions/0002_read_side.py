"""Contents, activity and dead letters; lag; `wait_for`; retention of the history; the schemas of a rebuild."""

from __future__ import annotations

from alembic import op

revision = "0002"
down_revision = "0001"

_TABLES = """
ALTER TABLE stampline.watermarks
    ALTER COLUMN input_offset DROP NOT NULL,
    ADD COLUMN feed_end bigint NOT NULL DEFAULT 0,
    ADD COLUMN caught_up_at timestamptz;
CREATE INDEX ix_files_digest ON stampline.files USING hash (encode(digest, 'hex'));

CREATE TABLE stampline.contents (
    size bigint NOT NULL,
    copies bigint NOT NULL,
    first_seen_at timestamptz NOT NULL,
    last_seen_at timestamptz NOT NULL,
    digest bytea NOT NULL,
    CONSTRAINT pk_contents PRIMARY KEY (digest),
    CONSTRAINT ck_contents_digest_bytes CHECK (octet_length(digest) = 32)
) WITH (fillfactor = 80);
CREATE INDEX ix_contents_wasted_bytes ON stampline.contents ((size * (copies - 1)) DESC, digest) WHERE copies > 1;

CREATE TABLE stampline.activity (
    minute timestamptz NOT NULL,
    events bigint NOT NULL,
    bytes bigint NOT NULL,
    committed bigint NOT NULL,
    unchanged bigint NOT NULL,
    duplicate bigint NOT NULL,
    conflict bigint NOT NULL,
    deferred bigint NOT NULL,
    gave_up bigint NOT NULL,
    rejected bigint NOT NULL,
    input_partition integer NOT NULL,
    namespace text NOT NULL,
    op text NOT NULL,
    CONSTRAINT pk_activity PRIMARY KEY (minute, namespace, op, input_partition)
) WITH (fillfactor = 80);

CREATE TABLE stampline.dead_letters (
    "offset" bigint NOT NULL,
    dead_at timestamptz NOT NULL,
    letter_offset bigint NOT NULL,
    "partition" integer NOT NULL,
    attempts integer NOT NULL,
    topic text NOT NULL,
    reason text NOT NULL,
    error text NOT NULL,
    status text NOT NULL,
    key text,
    key_bytes bytea,
    payload bytea,
    headers jsonb NOT NULL,
    CONSTRAINT pk_dead_letters PRIMARY KEY (topic, "partition", "offset"),
    CONSTRAINT ck_dead_letters_status CHECK (status IN ('open', 'replayed', 'dropped'))
);
CREATE INDEX ix_dead_letters_dead_at ON stampline.dead_letters (dead_at);

CREATE TABLE stampline.dropped_history (
    next_input_offset bigint NOT NULL,
    input_partition integer NOT NULL,
    CONSTRAINT pk_dropped_history PRIMARY KEY (input_partition)
);
"""

# What was projected before these projections existed: they start where the others stand, with what those tell.
_FILL = """
INSERT INTO stampline.contents (digest, size, copies, first_seen_at, last_seen_at)
SELECT seen.digest, seen.size, coalesce(live.copies, 0), seen.first_seen_at, seen.last_seen_at
FROM (
    SELECT digest, max(size) AS size, min(recorded_at) AS first_seen_at, max(recorded_at) AS last_seen_at
    FROM stampline.file_history
    WHERE outcome IN ('committed', 'unchanged') AND digest IS NOT NULL
    GROUP BY digest
) AS seen
LEFT JOIN (
    SELECT digest, count(*) AS copies FROM stampline.files WHERE NOT deleted GROUP BY digest
) AS live ON live.digest = seen.digest;

INSERT INTO stampline.activity
    (minute, namespace, op, input_partition, events, bytes, committed, unchanged, duplicate, conflict, deferred,
     gave_up, rejected)
SELECT date_trunc('minute', recorded_at, 'UTC'), coalesce(namespace, ''), coalesce(op, ''), input_partition,
       count(*), coalesce(sum(size), 0)::bigint,
       count(*) FILTER (WHERE outcome = 'committed'),
       count(*) FILTER (WHERE outcome = 'unchanged'),
       count(*) FILTER (WHERE outcome = 'duplicate'),
       count(*) FILTER (WHERE outcome = 'conflict'),
       count(*) FILTER (WHERE outcome = 'deferred'),
       count(*) FILTER (WHERE outcome = 'gave_up'),
       count(*) FILTER (WHERE outcome = 'rejected')
FROM stampline.file_history
GROUP BY 1, 2, 3, 4;

INSERT INTO stampline.watermarks
    (projection, partition, feed_offset, input_offset, event_time, updated_at, heartbeat_at, owner, feed_end)
SELECT name, partition, feed_offset, input_offset, event_time, updated_at, heartbeat_at, owner, feed_end
FROM stampline.watermarks, unnest(ARRAY['contents', 'activity']) AS name
WHERE projection = 'files';
"""

# A rebuild fills a table of the same name in `stampline_shadow`; a swap moves the live one to `stampline_old`. Each
# schema has watermarks of its own, so that every statement works in each of them.
_SCHEMAS = """
CREATE SCHEMA stampline_shadow;
CREATE SCHEMA stampline_old;
CREATE TABLE stampline_shadow.watermarks (LIKE stampline.watermarks INCLUDING ALL);
CREATE TABLE stampline_old.watermarks (LIKE stampline.watermarks INCLUDING ALL);
"""

# What is dropped is remembered by input offsets, so that nobody takes it for lost.
_DROP_HISTORY_BEFORE = """
CREATE FUNCTION stampline.drop_history_before(moment timestamptz) RETURNS SETOF text
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $function$
DECLARE
    name text;
BEGIN
    PERFORM pg_advisory_xact_lock(hashtextextended('stampline.file_history', 0));
    FOR name IN
        SELECT relname FROM pg_inherits JOIN pg_class ON pg_class.oid = inhrelid
        WHERE inhparent = 'stampline.file_history'::regclass
          AND relname ~ '^file_history_\\d{4,}_\\d{2}$'
          AND (to_date(substring(relname FROM 14), 'YYYY_MM') + interval '1 month') AT TIME ZONE 'UTC' <= moment
        ORDER BY relname
    LOOP
        EXECUTE format(
            'INSERT INTO stampline.dropped_history AS known (input_partition, next_input_offset)
             SELECT input_partition, max(input_offset) + 1 FROM stampline.%I GROUP BY input_partition
             ON CONFLICT (input_partition) DO UPDATE
             SET next_input_offset = greatest(known.next_input_offset, excluded.next_input_offset)', name);
        EXECUTE format('DROP TABLE stampline.%I', name);
        RETURN NEXT name;
    END LOOP;
END
$function$
"""

# Longer than ten heartbeats of a projector (`agents/projector.py`): it has stopped, or cannot reach this database.
_STALLED_AFTER = """
CREATE FUNCTION stampline.stalled_after() RETURNS interval
LANGUAGE sql IMMUTABLE PARALLEL SAFE AS $function$ SELECT interval '10 seconds' $function$
"""

# What became of the input at an offset: null where it is not visible yet. An event that was sent in again has become
# what its latest input has become.
_ANSWER = """
CREATE FUNCTION stampline.answer(token_partition integer, token_offset bigint) RETURNS text
LANGUAGE plpgsql STABLE SET search_path = pg_catalog, pg_temp AS $function$
DECLARE
    mark record;
    input record;
BEGIN
    SELECT min(input_offset) AS input_offset, min(heartbeat_at) AS heartbeat_at INTO mark
    FROM stampline.watermarks
    WHERE partition = token_partition AND input_offset IS NOT NULL;
    IF mark.input_offset IS NULL THEN
        RETURN NULL;
    ELSIF mark.input_offset > token_offset THEN
        SELECT outcome, uri, event_id INTO input
        FROM stampline.file_history
        WHERE input_partition = token_partition AND input_offset = token_offset;
        IF NOT FOUND THEN
            -- No uri could be read, or PostgreSQL refused it; or it was so long ago that it is not kept.
            RETURN CASE WHEN EXISTS (
                SELECT FROM stampline.dropped_history
                WHERE input_partition = token_partition AND next_input_offset > token_offset
            ) THEN 'reached' ELSE 'rejected' END;
        ELSIF input.outcome = 'deferred' THEN
            SELECT outcome INTO input
            FROM stampline.file_history
            WHERE uri = input.uri AND event_id = input.event_id AND outcome <> 'deferred'
              AND input_partition = token_partition AND input_offset > token_offset
            ORDER BY input_offset
            LIMIT 1;
        END IF;
        IF FOUND THEN
            RETURN CASE WHEN input.outcome IN ('rejected', 'conflict', 'gave_up') THEN 'rejected' ELSE 'reached' END;
        END IF;
    END IF;
    RETURN CASE WHEN clock_timestamp() - mark.heartbeat_at > stampline.stalled_after() THEN 'stalled' END;
END
$function$
"""

# The first looks come quickly, for most events are visible within a few; later ones a tenth of a second apart.
_WAIT_FOR = """
CREATE FUNCTION public.wait_for(token text, timeout interval) RETURNS text
LANGUAGE plpgsql VOLATILE SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $function$
DECLARE
    parts CONSTANT text[] := regexp_match(token, '^file-events:([0-9]{1,9}):([0-9]{1,18})$');
    deadline CONSTANT timestamptz := clock_timestamp() + timeout;
    pause_seconds double precision := 0.005;
    answer text;
BEGIN
    IF parts IS NULL THEN
        RAISE invalid_parameter_value USING
            MESSAGE = format('%s is no token', coalesce(quote_literal(token), 'null')),
            HINT = 'A token is what a producer gets for its event: file-events:PARTITION:OFFSET.';
    ELSIF timeout IS NULL THEN
        RAISE null_value_not_allowed USING
            MESSAGE = 'the timeout is null', HINT = 'Give an interval, for example interval ''2 seconds''.';
    ELSIF timeout > interval '0' AND current_setting('transaction_isolation') NOT LIKE 'read %' THEN
        RAISE feature_not_supported USING
            MESSAGE = 'a transaction at this isolation level never sees what it waits for',
            HINT = 'Call wait_for before the transaction, or in one that is READ COMMITTED.';
    END IF;
    LOOP
        answer := stampline.answer(parts[1]::integer, parts[2]::bigint);
        IF answer IS NOT NULL THEN
            RETURN answer;
        ELSIF clock_timestamp() >= deadline THEN
            RETURN 'timeout';
        END IF;
        PERFORM pg_sleep(least(pause_seconds, extract(epoch FROM deadline - clock_timestamp())));
        pause_seconds := least(pause_seconds * 1.5, 0.1);
    END LOOP;
END
$function$
"""

_VIEWS = """
CREATE VIEW public.contents AS
SELECT encode(digest, 'hex') AS digest, size, copies, size * copies AS bytes, first_seen_at, last_seen_at
FROM stampline.contents;

CREATE VIEW public.duplicates AS
SELECT encode(content.digest, 'hex') AS digest, content.size, content.copies,
       content.size * (content.copies - 1) AS wasted_bytes,
       ARRAY(
           SELECT example.uri
           FROM (
               SELECT file.uri FROM stampline.files AS file
               WHERE encode(file.digest, 'hex') = encode(content.digest, 'hex')
               LIMIT 10
           ) AS example
           ORDER BY example.uri
       ) AS uris
FROM stampline.contents AS content
WHERE content.copies > 1;

CREATE VIEW public.activity AS
SELECT minute, nullif(namespace, '') AS namespace, nullif(op, '') AS op,
       sum(events)::bigint AS events, sum(bytes)::bigint AS bytes, sum(committed)::bigint AS committed,
       sum(unchanged)::bigint AS unchanged, sum(duplicate)::bigint AS duplicate, sum(conflict)::bigint AS conflict,
       sum(deferred)::bigint AS deferred, sum(gave_up)::bigint AS gave_up, sum(rejected)::bigint AS rejected
FROM stampline.activity
GROUP BY minute, stampline.activity.namespace, stampline.activity.op;

CREATE VIEW public.dead_letters AS
SELECT topic, partition, "offset", reason, error, key, payload, headers, dead_at, status, attempts
FROM stampline.dead_letters;

CREATE VIEW public.projection_lag AS
SELECT projection, partition, rows_behind,
       CASE WHEN rows_behind = 0 AND status <> 'stalled' THEN 0 ELSE lag_ms END AS lag_ms,
       heartbeat_age_ms,
       CASE WHEN status = 'live' AND rows_behind > 0 AND lag_ms >= 2000 THEN 'catching_up' ELSE status END AS status
FROM (
    SELECT projection, partition, greatest(feed_end - feed_offset, 0) AS rows_behind,
           -- What is not visible is younger than the newest that is, and than the last moment when everything was.
           -- Where there has been neither, this is how long somebody has been at it.
           greatest(
               0,
               extract(epoch FROM clock_timestamp() - coalesce(greatest(event_time, caught_up_at), updated_at)) * 1000
           )::bigint AS lag_ms,
           greatest(0, extract(epoch FROM clock_timestamp() - heartbeat_at) * 1000)::bigint AS heartbeat_age_ms,
           CASE
               WHEN shadow THEN 'rebuilding'
               WHEN clock_timestamp() - heartbeat_at > stampline.stalled_after() THEN 'stalled'
               ELSE 'live'
           END AS status
    FROM (
        SELECT projection, partition, feed_offset, feed_end, event_time, caught_up_at, updated_at, heartbeat_at,
               false AS shadow
        FROM stampline.watermarks
        UNION ALL
        SELECT projection, partition, feed_offset, feed_end, event_time, caught_up_at, updated_at, heartbeat_at, true
        FROM stampline_shadow.watermarks
    ) AS mark
) AS told;
"""

_GRANT_READER = """
REVOKE ALL ON FUNCTION public.wait_for(text, interval) FROM PUBLIC;
GRANT EXECUTE ON FUNCTION public.wait_for(text, interval) TO stampline_reader;
GRANT SELECT ON public.contents, public.duplicates, public.activity, public.dead_letters, public.projection_lag
    TO stampline_reader;
"""


def upgrade() -> None:
    """Make the tables and fill those whose history is known, then the functions and views, and let the reader in."""
    _execute(_TABLES)
    _execute(_FILL)
    _execute(_SCHEMAS)
    for function in (_DROP_HISTORY_BEFORE, _STALLED_AFTER, _ANSWER, _WAIT_FOR):
        op.execute(function)
    _execute(_VIEWS)
    _execute(_GRANT_READER)


def downgrade() -> None:
    """Back to files and history; what only the dropped tables knew is lost."""
    op.execute(
        "DROP VIEW public.projection_lag, public.dead_letters, public.activity, public.duplicates, public.contents"
    )
    op.execute("DROP FUNCTION public.wait_for(text, interval), stampline.answer(integer, bigint)")
    op.execute("DROP FUNCTION stampline.stalled_after(), stampline.drop_history_before(timestamptz)")
    op.execute("DROP SCHEMA stampline_shadow, stampline_old CASCADE")
    op.execute("DROP TABLE stampline.dropped_history, stampline.dead_letters, stampline.activity, stampline.contents")
    op.execute("DROP INDEX stampline.ix_files_digest")
    op.execute("DELETE FROM stampline.watermarks WHERE projection NOT IN ('files', 'file_history')")
    op.execute(
        "ALTER TABLE stampline.watermarks ALTER COLUMN input_offset SET NOT NULL, DROP COLUMN feed_end, "
        "DROP COLUMN caught_up_at"
    )


def _execute(script: str) -> None:
    """Run each statement of `script`: the driver prepares statements, and prepares one at a time."""
    for statement in script.split(";\n"):
        if statement.strip():
            op.execute(statement)
