-- Every statement that stampline runs. A query begins with its name and ends with the next name; `$n` are its arguments.

-- name: ensure_history_partitions
-- Make the partitions of the month of $1 and of the month after it, where they are missing.
SELECT stampline.ensure_history_partitions($1)

-- name: open_watermarks
-- Take over partition $2: make the watermarks of projections $1 where they are missing, name the new owner $3, and
-- answer where each stands. $4 is now. A heartbeat it is not: a partition that fails is opened again and again.
INSERT INTO stampline.watermarks AS watermark
    (projection, partition, feed_offset, input_offset, updated_at, heartbeat_at, owner)
SELECT name, $2, 0, 0, $4, $4, $3
FROM unnest($1::text[]) AS name
ON CONFLICT (projection, partition) DO UPDATE
SET owner = excluded.owner
RETURNING projection, feed_offset

-- name: move_watermarks
-- The compare-and-set: move the watermarks of projections $1 in partition $2 from feed offset $3 to $4, those that
-- stand there. $5 is the next input offset and $6 the newest event's time (null = unchanged), $7 is now, $8 the owner.
-- The feed ends at $4 at the earliest: where it ends is looked up now and then, and may have been before.
UPDATE stampline.watermarks
SET feed_offset = $4,
    feed_end = greatest(feed_end, $4),
    input_offset = coalesce($5, input_offset),
    event_time = coalesce($6, event_time),
    updated_at = $7,
    heartbeat_at = $7,
    owner = $8
WHERE partition = $2 AND feed_offset = $3 AND projection = ANY ($1::text[])

-- name: begin_writing
-- Hold the lock of all who write (`WRITERS_LOCK` in projections/storage.py) until the transaction ends.
SELECT pg_advisory_xact_lock_shared(5706318204417031)

-- name: make_staging_tables
-- The session's own tables that rows are copied to; this costs a third less than arrays. They are empty when a
-- transaction begins. Made inside one that is rolled back they are gone, so nobody can know whether they are there.
CREATE TEMPORARY TABLE IF NOT EXISTS staged_contents (
    size bigint,
    copies bigint,
    first_seen_at timestamptz,
    last_seen_at timestamptz,
    digest bytea
) ON COMMIT DELETE ROWS;
CREATE TEMPORARY TABLE IF NOT EXISTS staged_activity (
    minute timestamptz,
    events bigint,
    bytes bigint,
    committed bigint,
    unchanged bigint,
    duplicate bigint,
    conflict bigint,
    deferred bigint,
    gave_up bigint,
    rejected bigint,
    namespace text,
    op text
) ON COMMIT DELETE ROWS;
CREATE TEMPORARY TABLE IF NOT EXISTS staged_files (
    uri_key uuid,
    version bigint,
    size bigint,
    occurred_at timestamptz,
    stamped_at timestamptz,
    input_offset bigint,
    deleted boolean,
    uri text,
    namespace text,
    op text,
    event_id text,
    digest bytea,
    workflow_id text,
    metadata text
) ON COMMIT DELETE ROWS

-- name: unstage_files
-- Forget what was staged before in the same transaction.
DELETE FROM pg_temp.staged_files

-- name: unstage_activity
-- Forget what was staged before in the same transaction.
DELETE FROM pg_temp.staged_activity

-- name: unstage_contents
-- Forget what was staged before in the same transaction.
DELETE FROM pg_temp.staged_contents

-- name: upsert_files
-- Bring the staged rows into `files`; all come from partition $1 and are projected at $2. A row that already shows the
-- same input is left alone, for a late duplicate repeats the state. Of the columns that are set only the digest is indexed,
-- so that an update which leaves it alone stays on its page. Rows are taken in the order of their keys: two partitions never deadlock, even where both hold a file
-- because the topic was made anew with another partition count.
INSERT INTO stampline.files AS file
    (uri_key, version, size, occurred_at, stamped_at, projected_at, input_offset, input_partition, deleted, uri,
     namespace, op, event_id, digest, workflow_id, metadata)
SELECT uri_key, version, size, occurred_at, stamped_at, $2::timestamptz, input_offset, $1::integer, deleted, uri,
       namespace, op, event_id, digest, workflow_id, metadata::jsonb
FROM pg_temp.staged_files
ORDER BY uri_key
ON CONFLICT (uri_key) DO UPDATE
SET version = excluded.version,
    size = excluded.size,
    occurred_at = excluded.occurred_at,
    stamped_at = excluded.stamped_at,
    projected_at = excluded.projected_at,
    input_offset = excluded.input_offset,
    input_partition = excluded.input_partition,
    deleted = excluded.deleted,
    namespace = excluded.namespace,
    op = excluded.op,
    event_id = excluded.event_id,
    digest = excluded.digest,
    workflow_id = excluded.workflow_id,
    metadata = excluded.metadata
WHERE (file.input_partition, file.input_offset) <> (excluded.input_partition, excluded.input_offset)

-- name: upsert_activity
-- Add the staged numbers to `activity`, to the rows of partition $1, which nobody else writes.
INSERT INTO stampline.activity AS activity
    (minute, events, bytes, committed, unchanged, duplicate, conflict, deferred, gave_up, rejected, input_partition,
     namespace, op)
SELECT minute, events, bytes, committed, unchanged, duplicate, conflict, deferred, gave_up, rejected, $1::integer,
       namespace, op
FROM pg_temp.staged_activity
ORDER BY minute, namespace, op
ON CONFLICT (minute, namespace, op, input_partition) DO UPDATE
SET events = activity.events + excluded.events,
    bytes = activity.bytes + excluded.bytes,
    committed = activity.committed + excluded.committed,
    unchanged = activity.unchanged + excluded.unchanged,
    duplicate = activity.duplicate + excluded.duplicate,
    conflict = activity.conflict + excluded.conflict,
    deferred = activity.deferred + excluded.deferred,
    gave_up = activity.gave_up + excluded.gave_up,
    rejected = activity.rejected + excluded.rejected

-- name: upsert_contents
-- Add the staged copies to `contents`. All partitions write these rows: they are taken in the order of their digests,
-- those that only lose copies in between, so that two partitions never deadlock. Such a row has no times, and is left
-- out where the content is not known: the change that brought it was refused. Its row cannot come in the meantime,
-- for only this partition could bring it. (A scalar subquery: EXISTS may become a scan of the whole table.) A content
-- without copies stays, because it was seen.
INSERT INTO stampline.contents AS content (size, copies, first_seen_at, last_seen_at, digest)
SELECT size, copies, coalesce(first_seen_at, 'infinity'), coalesce(last_seen_at, '-infinity'), digest
FROM pg_temp.staged_contents AS staged
WHERE first_seen_at IS NOT NULL
   OR (SELECT true FROM stampline.contents AS known WHERE known.digest = staged.digest)
ORDER BY digest
ON CONFLICT (digest) DO UPDATE
SET copies = content.copies + excluded.copies,
    first_seen_at = least(content.first_seen_at, excluded.first_seen_at),
    last_seen_at = greatest(content.last_seen_at, excluded.last_seen_at)

-- name: verify_watermarks
-- How far each partition is projected: the feed offset and the next input offset that all projections have reached.
SELECT partition, min(feed_offset) AS feed_offset, min(input_offset) AS input_offset
FROM stampline.watermarks
WHERE input_offset IS NOT NULL
GROUP BY partition
ORDER BY partition

-- name: verify_files
-- Number and checksum of the rows of `files` that came from partition $1; `pipeline.verify` computes the same sum.
SELECT count(*) AS files,
       coalesce(sum(('x' || left(md5(convert_to(concat_ws(
           '|', uri, version, coalesce(encode(digest, 'hex'), ''), coalesce(size::text, ''), deleted, input_offset
       ), 'UTF8')), 15))::bit(60)::bigint), 0)::numeric AS checksum
FROM stampline.files
WHERE input_partition = $1

-- name: verify_rows
-- The rows of `files` that came from partition $1, each as the text that `verify_files` sums up.
SELECT uri, input_offset,
       concat_ws(
           '|', uri, version, coalesce(encode(digest, 'hex'), ''), coalesce(size::text, ''), deleted, input_offset
       ) AS text
FROM stampline.files
WHERE input_partition = $1

-- name: verify_history
-- The input offsets of partition $1 in the history, and the first that was not dropped by age.
SELECT coalesce(array_agg(input_offset), '{}') AS offsets,
       coalesce((SELECT next_input_offset FROM stampline.dropped_history WHERE input_partition = $1), 0) AS dropped
FROM stampline.file_history
WHERE input_partition = $1

-- name: verify_outcomes
-- How often each outcome is in the history of partition $1.
SELECT outcome, count(*) AS inputs
FROM stampline.file_history
WHERE input_partition = $1
GROUP BY outcome

-- name: verify_versions
-- The files of partition $1 whose version is not the number of their commits in the history, or whose digest is not that
-- of the last of them. Of a partition whose history was dropped by age, only what is left can be looked at.
SELECT file.uri
FROM stampline.files AS file
LEFT JOIN (
    SELECT uri, count(*) AS commits, min(version) AS first, max(version) AS last,
           (array_agg(digest ORDER BY version DESC))[1] AS digest
    FROM stampline.file_history
    WHERE input_partition = $1 AND outcome = 'committed'
    GROUP BY uri
) AS told ON told.uri = file.uri
CROSS JOIN LATERAL (
    SELECT EXISTS (SELECT FROM stampline.dropped_history WHERE input_partition = $1) AS is_so
) AS dropped
WHERE file.input_partition = $1
  AND CASE
          WHEN told.uri IS NULL THEN NOT dropped.is_so
          ELSE told.last <> file.version OR told.digest IS DISTINCT FROM file.digest
               OR told.commits <> told.last - told.first + 1 OR (told.first <> 1 AND NOT dropped.is_so)
      END

-- name: verify_activity
-- The minutes of `activity` of partition $1 that are not what the history adds up to; none where some of that was dropped.
SELECT coalesce(shown.minute, told.minute) AS minute
FROM (SELECT * FROM stampline.activity WHERE input_partition = $1) AS shown
FULL JOIN (
    SELECT date_trunc('minute', recorded_at, 'UTC') AS minute, coalesce(namespace, '') AS namespace,
           coalesce(op, '') AS op, count(*) AS events, coalesce(sum(size), 0) AS bytes,
           count(*) FILTER (WHERE outcome = 'committed') AS committed,
           count(*) FILTER (WHERE outcome = 'unchanged') AS unchanged,
           count(*) FILTER (WHERE outcome = 'duplicate') AS duplicate,
           count(*) FILTER (WHERE outcome = 'conflict') AS conflict,
           count(*) FILTER (WHERE outcome = 'deferred') AS deferred,
           count(*) FILTER (WHERE outcome = 'gave_up') AS gave_up,
           count(*) FILTER (WHERE outcome = 'rejected') AS rejected
    FROM stampline.file_history
    WHERE input_partition = $1
    GROUP BY 1, 2, 3
) AS told USING (minute, namespace, op)
WHERE (shown.events, shown.bytes, shown.committed, shown.unchanged, shown.duplicate, shown.conflict, shown.deferred,
       shown.gave_up, shown.rejected)
      IS DISTINCT FROM
      (told.events, told.bytes, told.committed, told.unchanged, told.duplicate, told.conflict, told.deferred,
       told.gave_up, told.rejected)
  AND NOT EXISTS (SELECT FROM stampline.dropped_history WHERE input_partition = $1)

-- name: verify_contents
-- The digests whose row of `contents` is not what the live files, and for when they were seen the history, add up to.
SELECT encode(coalesce(shown.digest, told.digest), 'hex') AS digest
FROM stampline.contents AS shown
FULL JOIN (
    SELECT digest, coalesce(live.copies, 0) AS copies, seen.first_seen_at, seen.last_seen_at
    FROM (
        SELECT digest, count(*) AS copies FROM stampline.files WHERE NOT deleted GROUP BY digest
    ) AS live
    FULL JOIN (
        SELECT digest, min(recorded_at) AS first_seen_at, max(recorded_at) AS last_seen_at
        FROM stampline.file_history
        WHERE outcome IN ('committed', 'unchanged') AND digest IS NOT NULL
        GROUP BY digest
    ) AS seen USING (digest)
) AS told USING (digest)
WHERE coalesce(shown.copies, -1) <> coalesce(told.copies, 0)
   OR (
       (shown.first_seen_at, shown.last_seen_at) IS DISTINCT FROM (told.first_seen_at, told.last_seen_at)
       AND NOT EXISTS (SELECT FROM stampline.dropped_history)
   )

-- name: input_watermarks
-- The next input offset of each partition that is visible in all projections.
SELECT partition, min(input_offset) AS input_offset, max(heartbeat_at) AS heartbeat_at
FROM projection_watermarks
WHERE input_offset IS NOT NULL
GROUP BY partition
ORDER BY partition

-- name: summary
-- What an analyst would ask first, from the views alone: files, their bytes, inputs by outcome, and the freshness of
-- what was projected since $1, in ms from Kafka's clock to the projector's.
SELECT
    (SELECT count(*) FROM files WHERE NOT deleted) AS files,
    (SELECT coalesce(sum(size), 0)::bigint FROM files WHERE NOT deleted) AS bytes,
    count(*) AS events,
    count(*) FILTER (WHERE outcome = 'rejected') AS rejected,
    percentile_cont(ARRAY[0.5, 0.99]) WITHIN GROUP (
        ORDER BY extract(epoch FROM projected_at - recorded_at) * 1000
    ) AS freshness_ms
FROM file_history
WHERE projected_at >= $1

-- name: duplicate_groups
-- Every content that more than one live file has, the most wasteful first; an empty file wastes nothing.
SELECT digest, size, count(*) AS copies, size * (count(*) - 1) AS wasted_bytes, min(uri) AS uri
FROM files
WHERE NOT deleted
GROUP BY digest, size
HAVING count(*) > 1
ORDER BY wasted_bytes DESC, digest

-- name: beat_watermarks
-- Tell that owner $1 is there. For each entry (projection $2, partition $3, feed offset $4, feed end $5, whether it is
-- caught up $6; looked at $7 seconds ago) the watermark is left alone where it is another's or stands elsewhere. So is
-- one that a batch has locked: the batch tells the same, and who waited for one watermark while holding another would
-- wait in a circle with it. The time is the server's, by which the heartbeats are judged.
UPDATE stampline.watermarks AS watermark
SET heartbeat_at = clock_timestamp(),
    feed_end = pulse.feed_end,
    caught_up_at = CASE
        WHEN pulse.caught_up THEN clock_timestamp() - make_interval(secs => $7::double precision)
        ELSE watermark.caught_up_at
    END
FROM (
    SELECT projection, partition, told.feed_end, told.caught_up
    FROM stampline.watermarks AS held
    JOIN unnest($2::text[], $3::integer[], $4::bigint[], $5::bigint[], $6::boolean[])
        AS told (projection, partition, feed_offset, feed_end, caught_up) USING (projection, partition)
    WHERE held.owner = $1 AND held.feed_offset = told.feed_offset
    FOR UPDATE OF held SKIP LOCKED
) AS pulse
WHERE watermark.projection = pulse.projection AND watermark.partition = pulse.partition

-- name: projection_lag
-- How far each projection of each partition is behind.
SELECT projection, partition, rows_behind, lag_ms, heartbeat_age_ms, status
FROM projection_lag
ORDER BY projection, partition

-- name: open_dead_letters
-- Take over the dead letters of partition $2: make the watermark of projection $1 where it is missing, name the new
-- owner $3, and answer where it stands. $4 is now. There is no input offset: this feed is not one of file events.
INSERT INTO stampline.watermarks AS watermark (projection, partition, feed_offset, updated_at, heartbeat_at, owner)
VALUES ($1, $2, 0, $4, $4, $3)
ON CONFLICT (projection, partition) DO UPDATE
SET owner = excluded.owner
RETURNING feed_offset

-- name: stage_dead_letters
-- The session's own table that dead letters are copied to; see `make_staging_tables`.
CREATE TEMPORARY TABLE IF NOT EXISTS staged_dead_letters (
    topic text,
    partition integer,
    "offset" bigint,
    dead_at timestamptz,
    letter_offset bigint,
    attempts integer,
    reason text,
    error text,
    key text,
    key_bytes bytea,
    payload bytea,
    headers text,
    mark text
) ON COMMIT DELETE ROWS

-- name: upsert_dead_letters
-- Bring the staged letters into their table. The first of equal ones stays, with the most attempts; a row that only a
-- mark has told of is filled, and keeps its status.
INSERT INTO stampline.dead_letters AS letter
    (topic, partition, "offset", dead_at, letter_offset, attempts, reason, error, status, key, key_bytes, payload,
     headers)
SELECT topic, partition, "offset", dead_at, letter_offset, attempts, reason, error, 'open', key, key_bytes, payload,
       headers::jsonb
FROM pg_temp.staged_dead_letters
WHERE letter_offset >= 0
ORDER BY topic, partition, "offset"
ON CONFLICT (topic, partition, "offset") DO UPDATE
SET attempts = greatest(letter.attempts, excluded.attempts),
    letter_offset = CASE WHEN letter.letter_offset < 0 THEN excluded.letter_offset ELSE letter.letter_offset END,
    dead_at = CASE WHEN letter.letter_offset < 0 THEN excluded.dead_at ELSE letter.dead_at END,
    reason = CASE WHEN letter.letter_offset < 0 THEN excluded.reason ELSE letter.reason END,
    error = CASE WHEN letter.letter_offset < 0 THEN excluded.error ELSE letter.error END,
    key = CASE WHEN letter.letter_offset < 0 THEN excluded.key ELSE letter.key END,
    key_bytes = CASE WHEN letter.letter_offset < 0 THEN excluded.key_bytes ELSE letter.key_bytes END,
    payload = CASE WHEN letter.letter_offset < 0 THEN excluded.payload ELSE letter.payload END,
    headers = CASE WHEN letter.letter_offset < 0 THEN excluded.headers ELSE letter.headers END
WHERE letter.letter_offset < 0 OR letter.attempts < excluded.attempts

-- name: mark_dead_letters
-- Apply the staged marks. One whose letter is not there is remembered by a row of its own.
INSERT INTO stampline.dead_letters AS letter
    (topic, partition, "offset", dead_at, letter_offset, attempts, reason, error, status, headers)
SELECT topic, partition, "offset", dead_at, letter_offset, attempts, reason, error, mark, headers::jsonb
FROM pg_temp.staged_dead_letters
WHERE mark IS NOT NULL
ORDER BY topic, partition, "offset"
ON CONFLICT (topic, partition, "offset") DO UPDATE
SET status = excluded.status
WHERE letter.status <> excluded.status

-- name: newest_dead_letters
-- Dead letters without their content, the newest first: reason $1, topic one of $2, dead from $3 on and before $4,
-- status $5 (null = whatever it is); at most $6.
SELECT topic, partition, "offset", reason, error, key, dead_at, status, attempts,
       letter_offset, octet_length(payload) AS payload_bytes
FROM stampline.dead_letters
WHERE ($1::text IS NULL OR reason = $1) AND ($2::text[] IS NULL OR topic = ANY ($2))
  AND ($3::timestamptz IS NULL OR dead_at >= $3) AND ($4::timestamptz IS NULL OR dead_at < $4)
  AND ($5::text IS NULL OR status = $5)
ORDER BY dead_at DESC, topic, partition, "offset" DESC
LIMIT $6

-- name: dead_letters_in_order
-- The same, in the order of the originals.
SELECT topic, partition, "offset", reason, error, key, dead_at, status, attempts,
       letter_offset, octet_length(payload) AS payload_bytes
FROM stampline.dead_letters
WHERE ($1::text IS NULL OR reason = $1) AND ($2::text[] IS NULL OR topic = ANY ($2))
  AND ($3::timestamptz IS NULL OR dead_at >= $3) AND ($4::timestamptz IS NULL OR dead_at < $4)
  AND ($5::text IS NULL OR status = $5)
ORDER BY topic, partition, "offset"
LIMIT $6

-- name: dead_letters_by_id
-- Dead letters without their content, by the topics $1, partitions $2 and offsets $3 of their originals.
SELECT topic, partition, "offset", reason, error, key, dead_at, status, attempts,
       letter_offset, octet_length(payload) AS payload_bytes
FROM stampline.dead_letters
JOIN unnest($1::text[], $2::integer[], $3::bigint[]) AS wanted (topic, partition, "offset")
    USING (topic, partition, "offset")

-- name: read_dead_letters
-- Dead letters with their content, by the topics $1, partitions $2 and offsets $3 of their originals.
SELECT topic, partition, "offset", reason, error, key, dead_at, status, attempts,
       letter_offset, octet_length(payload) AS payload_bytes, key_bytes, payload, headers
FROM stampline.dead_letters
JOIN unnest($1::text[], $2::integer[], $3::bigint[]) AS wanted (topic, partition, "offset")
    USING (topic, partition, "offset")

-- name: dead_letter_watermarks
-- Up to which offset each partition of the topic of dead letters is projected.
SELECT partition, feed_offset FROM stampline.watermarks WHERE projection = 'dead_letters'

-- name: drop_history
-- Drop the months of the history that end at $1 or earlier, and name their tables.
SELECT stampline.drop_history_before($1) AS name

-- name: old_history
-- The tables that `drop_history` would drop.
SELECT relname AS name
FROM pg_inherits
JOIN pg_class ON pg_class.oid = inhrelid
WHERE inhparent = 'stampline.file_history'::regclass
  AND relname ~ '^file_history_\d{4,}_\d{2}$'
  AND (to_date(substring(relname FROM 14), 'YYYY_MM') + interval '1 month') AT TIME ZONE 'UTC' <= $1
ORDER BY relname
