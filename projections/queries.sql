-- Every statement that stampline runs. A query begins with its name and ends with the next name; `$n` are its arguments.

-- name: ensure_history_partitions
-- Make the partitions of the month of $1 and of the month after it, where they are missing.
SELECT stampline.ensure_history_partitions($1)

-- name: open_watermarks
-- Take over partition $2: make the watermarks of projections $1 where they are missing, name the new owner $3, and
-- answer where each stands. $4 is now.
INSERT INTO stampline.watermarks AS watermark
    (projection, partition, feed_offset, input_offset, updated_at, heartbeat_at, owner)
SELECT name, $2, 0, 0, $4, $4, $3
FROM unnest($1::text[]) AS name
ON CONFLICT (projection, partition) DO UPDATE
SET owner = excluded.owner, heartbeat_at = excluded.heartbeat_at
RETURNING projection, feed_offset

-- name: move_watermarks
-- The compare-and-set: move the watermarks of projections $1 in partition $2 from feed offset $3 to $4, those that
-- stand there. $5 is the next input offset and $6 the newest event's time (null = unchanged), $7 is now, $8 the owner.
UPDATE stampline.watermarks
SET feed_offset = $4,
    input_offset = coalesce($5, input_offset),
    event_time = coalesce($6, event_time),
    updated_at = $7,
    heartbeat_at = $7,
    owner = $8
WHERE partition = $2 AND feed_offset = $3 AND projection = ANY ($1::text[])

-- name: stage_files
-- The session's own table that rows of `files` are copied to; this costs a third less than arrays.
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

-- name: upsert_files
-- Bring the staged rows into `files`; all come from partition $1 and are projected at $2. A row that already shows the
-- same input is left alone, for a late duplicate repeats the state. No indexed column is set, so that the update stays on
-- its page. Rows are taken in the order of their keys: two partitions never deadlock, even where both hold a file
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

-- name: verify_watermarks
-- How far each partition is projected: the feed offset and the next input offset that all projections have reached.
SELECT partition, min(feed_offset) AS feed_offset, min(input_offset) AS input_offset
FROM stampline.watermarks
GROUP BY partition
ORDER BY partition

-- name: verify_files
-- The rows of `files` that came from partition $1.
SELECT uri, version, digest, size, deleted, input_offset
FROM stampline.files
WHERE input_partition = $1

-- name: verify_history
-- The history of partition $1, in the order of its inputs.
SELECT uri, input_offset, outcome, version, digest
FROM stampline.file_history
WHERE input_partition = $1
ORDER BY input_offset

-- name: input_watermarks
-- The next input offset of each partition that is visible in all projections.
SELECT partition, min(input_offset) AS input_offset, max(heartbeat_at) AS heartbeat_at
FROM projection_watermarks
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
