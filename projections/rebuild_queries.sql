-- The statements of a rebuild, in the manner of queries.sql. `stampline.` is the live schema. `stampline_shadow.` stands
-- for the schema of a copy: it is replaced where the copy is the old one.

-- name: take_guard
-- Keep everybody else from projection $1 for as long as this session lasts; false where somebody is at it.
SELECT pg_try_advisory_lock(hashtextextended('stampline.rebuild.' || $1, 0))

-- name: find_copy
-- Whether schema $2 has a table for projection $1.
SELECT to_regclass(format('%I.%I', $2::text, $1::text)) IS NOT NULL

-- name: shape
-- What the table of projection $1 in schema $2 looks like: columns and indexes, to compare with another schema's.
SELECT concat_ws(
    E'\n',
    (
        SELECT string_agg(format('%s %s %s', attname, format_type(atttypid, atttypmod), attnotnull), ', ' ORDER BY attnum)
        FROM pg_attribute WHERE attrelid = relation AND attnum > 0 AND NOT attisdropped
    ),
    (
        SELECT string_agg(
            regexp_replace(pg_get_indexdef(indexrelid), ' ON (ONLY )?\w+\.', ' ON '), E'\n' ORDER BY indexrelid::regclass::text
        )
        FROM pg_index WHERE indrelid = relation
    )
)
FROM to_regclass(format('%I.%I', $2::text, $1::text)) AS relation

-- name: creation
-- The statements that make an empty copy of the live table $1 in schema $2. Names of indexes and constraints are those
-- of the live table, and so is its owner: who may read a view on it is asked of the view's owner.
SELECT statement
FROM (
    SELECT 1 AS place, '' AS name, format(
        'CREATE TABLE %I.%I (LIKE stampline.%I INCLUDING ALL EXCLUDING INDEXES)%s%s',
        $2::text, relname, relname, ' PARTITION BY ' || pg_get_partkeydef(oid),
        ' WITH (' || array_to_string(reloptions, ', ') || ')'
    ) AS statement
    FROM pg_class WHERE oid = to_regclass(format('stampline.%I', $1::text))
    UNION ALL
    SELECT 2, '', format('ALTER TABLE %I.%I OWNER TO %I', $2::text, relname, pg_get_userbyid(relowner))
    FROM pg_class WHERE oid = to_regclass(format('stampline.%I', $1::text))
    UNION ALL
    SELECT 3, conname, format('ALTER TABLE %I.%I ADD CONSTRAINT %I %s', $2::text, $1::text, conname, pg_get_constraintdef(oid))
    FROM pg_constraint
    WHERE conrelid = to_regclass(format('stampline.%I', $1::text)) AND contype IN ('p', 'u', 'x')
    UNION ALL
    SELECT 4, indexrelid::regclass::text,
           regexp_replace(pg_get_indexdef(indexrelid), ' ON (ONLY )?\w+\.', format(' ON %I.', $2::text))
    FROM pg_index
    WHERE indrelid = to_regclass(format('stampline.%I', $1::text))
      AND NOT EXISTS (SELECT FROM pg_constraint WHERE conindid = indexrelid AND contype IN ('p', 'u', 'x'))
) AS step
ORDER BY place, name

-- name: alignment
-- The statements that give the copy of $1 in schema $2 the partitions of the live table: those that it lacks are made,
-- those that the live table has lost (they were dropped by age) are dropped.
WITH live AS (
    SELECT part.oid, part.relname, pg_get_expr(part.relpartbound, part.oid) AS bound, part.relowner
    FROM pg_inherits JOIN pg_class AS part ON part.oid = inhrelid
    WHERE inhparent = to_regclass(format('stampline.%I', $1::text))
), copied AS (
    SELECT part.relname
    FROM pg_inherits JOIN pg_class AS part ON part.oid = inhrelid
    WHERE inhparent = to_regclass(format('%I.%I', $2::text, $1::text))
)
SELECT statement
FROM (
    SELECT 1 AS place, relname, format('DROP TABLE %I.%I', $2::text, relname) AS statement
    FROM copied WHERE relname NOT IN (SELECT relname FROM live)
    UNION ALL
    SELECT 2, relname, format('CREATE TABLE %I.%I PARTITION OF %I.%I %s', $2::text, relname, $2::text, $1::text, bound)
    FROM live WHERE relname NOT IN (SELECT relname FROM copied)
    UNION ALL
    SELECT 3, relname, format('ALTER TABLE %I.%I OWNER TO %I', $2::text, relname, pg_get_userbyid(relowner))
    FROM live WHERE relname NOT IN (SELECT relname FROM copied)
) AS step
ORDER BY place, relname

-- name: forget_dropped_history
-- Take out of the copied history what was dropped by age from the live one.
DELETE FROM stampline_shadow.file_history AS row
USING stampline.dropped_history AS dropped
WHERE row.input_partition = dropped.input_partition AND row.input_offset < dropped.next_input_offset

-- name: dropped_history
-- The input offset of partition $1 up to which the history was dropped by age.
SELECT coalesce(max(next_input_offset), 0) FROM stampline.dropped_history WHERE input_partition = $1

-- name: make_contents_seen
-- What the copy of `contents` has counted for each file: null where the file is deleted. `incomplete` files were met
-- with something before them missing in the feed.
CREATE TABLE IF NOT EXISTS stampline_shadow.contents_seen (
    uri_key uuid PRIMARY KEY,
    digest bytea,
    size bigint,
    incomplete boolean NOT NULL
) WITH (fillfactor = 80)

-- name: live_marks
-- How far the live projections $1 have come in each partition. They stand together, but for one that was restored or
-- changed alone, which a rebuild brings back to the others.
SELECT partition, max(feed_offset) AS feed_offset, max(input_offset) AS input_offset
FROM stampline.watermarks
WHERE projection = ANY ($1::text[])
GROUP BY partition
ORDER BY partition

-- name: copy_marks
-- How far the copy of projection $1 has come in each partition.
SELECT partition, feed_offset, input_offset, updated_at
FROM stampline_shadow.watermarks
WHERE projection = $1
ORDER BY partition

-- name: set_copy_ends
-- Note where the copy of projection $1 has to go: to feed offset $3 in partition $2. The view of the lag shows it.
UPDATE stampline_shadow.watermarks AS watermark
SET feed_end = told.feed_end
FROM unnest($2::integer[], $3::bigint[]) AS told (partition, feed_end)
WHERE watermark.projection = $1 AND watermark.partition = told.partition

-- name: live_lag
-- How late the live projections are, in ms. One that has stopped is late for another reason than a rebuild.
SELECT coalesce(max(lag_ms), 0)::bigint FROM public.projection_lag WHERE status IN ('live', 'catching_up')

-- name: commit_loosely
-- A crash may lose the newest commits of the copy, rows and watermark together, and the feed still has them.
SET LOCAL synchronous_commit = off

-- name: keep_files_projected_at
-- The staged files that the live table shows as of the same input were projected when the live row was.
UPDATE stampline_shadow.files AS file
SET projected_at = live.projected_at
FROM pg_temp.staged_files AS staged
JOIN stampline.files AS live ON live.uri_key = staged.uri_key AND live.input_offset = staged.input_offset
WHERE file.uri_key = staged.uri_key
  AND file.input_offset = live.input_offset AND file.input_partition = live.input_partition
  AND file.projected_at <> live.projected_at

-- name: history_projected_at
-- When the live history has projected the inputs $2 of partition $1.
SELECT input_offset, min(projected_at) AS projected_at
FROM stampline.file_history
WHERE input_partition = $1 AND input_offset = ANY ($2::bigint[])
GROUP BY input_offset

-- name: copy_history
-- Copy the live history of partition $1 from input offset $2 to before $3, without the inputs $4, which the feed has.
INSERT INTO stampline_shadow.file_history
    (input_offset, version, size, occurred_at, recorded_at, projected_at, input_partition, uri, namespace, event_id, op,
     outcome, reason, digest)
SELECT DISTINCT ON (input_offset)
    input_offset, version, size, occurred_at, recorded_at, projected_at, input_partition, uri, namespace, event_id, op,
    outcome, reason, digest
FROM stampline.file_history AS live
WHERE input_partition = $1 AND input_offset >= $2 AND input_offset < $3
  AND NOT EXISTS (SELECT FROM unnest($4::bigint[]) AS own (input_offset) WHERE own.input_offset = live.input_offset)
ORDER BY input_offset, projected_at

-- name: copy_activity
-- Count what the live history of partition $1 tells from input offset $2 to before $3, without the inputs $4, which the
-- feed has, and answer how many inputs that were.
WITH lost AS MATERIALIZED (
    SELECT DISTINCT ON (input_offset) recorded_at, namespace, op, size, outcome
    FROM stampline.file_history AS live
    WHERE input_partition = $1 AND input_offset >= $2 AND input_offset < $3
      AND NOT EXISTS (SELECT FROM unnest($4::bigint[]) AS own (input_offset) WHERE own.input_offset = live.input_offset)
    ORDER BY input_offset, projected_at
), written AS (
    INSERT INTO stampline_shadow.activity AS activity
        (minute, namespace, op, input_partition, events, bytes, committed, unchanged, duplicate, conflict, deferred,
         gave_up, rejected)
    SELECT date_trunc('minute', recorded_at, 'UTC'), coalesce(namespace, ''), coalesce(op, ''), $1::integer,
           count(*), coalesce(sum(size), 0)::bigint,
           count(*) FILTER (WHERE outcome = 'committed'),
           count(*) FILTER (WHERE outcome = 'unchanged'),
           count(*) FILTER (WHERE outcome = 'duplicate'),
           count(*) FILTER (WHERE outcome = 'conflict'),
           count(*) FILTER (WHERE outcome = 'deferred'),
           count(*) FILTER (WHERE outcome = 'gave_up'),
           count(*) FILTER (WHERE outcome = 'rejected')
    FROM lost
    GROUP BY 1, 2, 3
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
)
SELECT count(*) FROM lost

-- name: forget_old_activity
-- Where the history was dropped by age nobody can count again: of the minutes up to the first whose history was kept,
-- the live table is the only witness.
DELETE FROM stampline_shadow.activity AS row
USING stampline.dropped_history AS dropped
WHERE row.input_partition = dropped.input_partition
  AND row.minute <= coalesce(
      (
          SELECT date_trunc('minute', kept.recorded_at, 'UTC') FROM stampline.file_history AS kept
          WHERE kept.input_partition = dropped.input_partition ORDER BY kept.input_offset LIMIT 1
      ),
      'infinity'
  )

-- name: adopt_old_activity
-- The second half of `forget_old_activity`.
INSERT INTO stampline_shadow.activity
    (minute, events, bytes, committed, unchanged, duplicate, conflict, deferred, gave_up, rejected, input_partition,
     namespace, op)
SELECT row.minute, row.events, row.bytes, row.committed, row.unchanged, row.duplicate, row.conflict, row.deferred,
       row.gave_up, row.rejected, row.input_partition, row.namespace, row.op
FROM stampline.activity AS row
JOIN stampline.dropped_history AS dropped ON row.input_partition = dropped.input_partition
WHERE row.minute <= coalesce(
    (
        SELECT date_trunc('minute', kept.recorded_at, 'UTC') FROM stampline.file_history AS kept
        WHERE kept.input_partition = dropped.input_partition ORDER BY kept.input_offset LIMIT 1
    ),
    'infinity'
)

-- name: find_seen
-- What the copy of `contents` has counted for the files $1.
SELECT uri_key, digest, size FROM stampline_shadow.contents_seen WHERE uri_key = ANY ($1::uuid[])

-- name: mark_seen
-- Note for the files $1 that digests $2 of sizes $3 are counted now, and whether something before them was missing ($4).
INSERT INTO stampline_shadow.contents_seen AS seen (uri_key, digest, size, incomplete)
SELECT * FROM unnest($1::uuid[], $2::bytea[], $3::bigint[], $4::boolean[])
ON CONFLICT (uri_key) DO UPDATE
SET digest = excluded.digest, size = excluded.size, incomplete = seen.incomplete OR excluded.incomplete
WHERE seen.digest IS DISTINCT FROM excluded.digest OR (excluded.incomplete AND NOT seen.incomplete)

-- name: live_times
-- Between which times the live table has seen the contents $1.
SELECT digest, first_seen_at, last_seen_at FROM stampline.contents WHERE digest = ANY ($1::bytea[])

-- name: count_incomplete
-- How many files were met with something before them missing in the feed.
SELECT count(*) FROM stampline_shadow.contents_seen WHERE incomplete

-- name: keep_live_contents
-- The session's own copy of the live contents, of the moment when they are compared.
CREATE TEMPORARY TABLE live_contents AS
SELECT size, copies, first_seen_at, last_seen_at, digest FROM stampline.contents

-- name: adopt_contents
-- What the feed does not tell any more: when a content was first and last seen, and contents that no file has now.
INSERT INTO stampline_shadow.contents AS content (size, copies, first_seen_at, last_seen_at, digest)
SELECT live.size, 0, live.first_seen_at, live.last_seen_at, live.digest
FROM pg_temp.live_contents AS live
LEFT JOIN stampline_shadow.contents AS known ON known.digest = live.digest
WHERE (known.digest IS NULL AND live.copies = 0)
   OR known.first_seen_at > live.first_seen_at OR known.last_seen_at < live.last_seen_at
ON CONFLICT (digest) DO UPDATE
SET first_seen_at = least(content.first_seen_at, excluded.first_seen_at),
    last_seen_at = greatest(content.last_seen_at, excluded.last_seen_at)

-- name: drop_live_contents
DROP TABLE IF EXISTS pg_temp.live_contents

-- name: compare_gently
-- One core is enough for a comparison that nobody waits for.
SET LOCAL max_parallel_workers_per_gather = 0

-- name: sum_files
-- The rows of each partition and a checksum that does not depend on their order.
SELECT input_partition AS partition, count(*) AS rows,
       sum(hashtextextended(ROW(uri_key, version, size, occurred_at, stamped_at, input_offset, deleted, uri, namespace,
                                op, event_id, digest, workflow_id, metadata)::text, 0)::numeric) AS checksum
FROM stampline_shadow.files
GROUP BY input_partition

-- name: sum_file_history
-- As `sum_files`.
SELECT input_partition AS partition, count(*) AS rows,
       sum(hashtextextended(ROW(input_offset, version, size, occurred_at, recorded_at, uri, namespace, event_id, op,
                                outcome, reason, digest)::text, 0)::numeric) AS checksum
FROM stampline_shadow.file_history
GROUP BY input_partition

-- name: sum_activity
-- As `sum_files`.
SELECT input_partition AS partition, count(*) AS rows,
       sum(hashtextextended(ROW(minute, namespace, op, events, bytes, committed, unchanged, duplicate, conflict,
                                deferred, gave_up, rejected)::text, 0)::numeric) AS checksum
FROM stampline_shadow.activity
GROUP BY input_partition

-- name: sum_contents
-- As `sum_files`; no row belongs to a partition.
SELECT NULL::integer AS partition, count(*) AS rows,
       coalesce(sum(hashtextextended(ROW(digest, size, copies, first_seen_at, last_seen_at)::text, 0)::numeric), 0)
       AS checksum
FROM stampline_shadow.contents

-- name: bound_waiting
-- How long, in ms, a lock may be waited for and a statement may take, until the transaction ends.
SELECT set_config('lock_timeout', $1::text, true), set_config('statement_timeout', $2::text, true)

-- name: lock_writers
-- Wait until nobody who writes is in a transaction, and keep all others from beginning to.
SELECT pg_advisory_xact_lock($1)

-- name: lock_partitions
-- Keep others from making and dropping partitions of the history; the functions that do so take this lock.
SELECT pg_advisory_xact_lock(hashtextextended('stampline.file_history', 0))

-- name: qualify_names
-- From here on every name of ours is written out with its schema.
SET LOCAL search_path = pg_catalog

-- name: dependents
-- What stands directly on the table of projection $1 in schema $2: the place of each view, the statement that makes it
-- again with the same text, and whether it can be. Where names are qualified, that text finds the table that has the name then; the
-- view stays the same object, with its grants and with the views that stand on it.
SELECT format('%I.%I', space.nspname, view.relname) AS place,
       view.relkind = 'v' AS replaceable,
       format(
           'CREATE OR REPLACE VIEW %I.%I%s AS %s', space.nspname, view.relname,
           ' WITH (' || array_to_string(view.reloptions, ', ') || ')', pg_get_viewdef(view.oid)
       ) AS statement
FROM pg_class AS view
JOIN pg_namespace AS space ON space.oid = view.relnamespace
WHERE view.relkind IN ('v', 'm') AND EXISTS (
    SELECT
    FROM pg_rewrite AS rule
    JOIN pg_depend AS link ON link.classid = 'pg_rewrite'::regclass AND link.objid = rule.oid
    WHERE rule.ev_class = view.oid
      AND link.refclassid = 'pg_class'::regclass AND link.refobjid = to_regclass(format('%I.%I', $2::text, $1::text))
)
ORDER BY place

-- name: moving
-- The statements that move the table of projection $1, with its partitions, from schema $2 to schema $3. Indexes and
-- constraints go with their tables; names are unique per schema, so nothing is renamed.
SELECT format('ALTER TABLE %I.%I SET SCHEMA %I', $2::text, relation.relname, $3::text) AS statement
FROM pg_class AS relation
WHERE relation.relnamespace = to_regnamespace($2::text)
  AND (
      relation.oid = to_regclass(format('%I.%I', $2::text, $1::text))
      OR relation.oid IN (
          SELECT inhrelid FROM pg_inherits WHERE inhparent = to_regclass(format('%I.%I', $2::text, $1::text))
      )
  )
ORDER BY relation.relname

-- name: keep_old_watermarks
-- Where the live table of projection $1 stands when it becomes the old one, at $2.
INSERT INTO stampline_old.watermarks
    (feed_offset, input_offset, event_time, updated_at, heartbeat_at, partition, projection, owner, feed_end)
SELECT feed_offset, input_offset, event_time, $2, $2, partition, projection, owner, feed_end
FROM stampline.watermarks WHERE projection = $1

-- name: restore_watermarks
-- The watermarks of projection $1 are those of the table that has become live. They differ only where the live ones
-- had been changed alone.
INSERT INTO stampline.watermarks AS live
    (feed_offset, input_offset, event_time, updated_at, heartbeat_at, partition, projection, owner, feed_end)
SELECT feed_offset, input_offset, event_time, updated_at, heartbeat_at, partition, projection, owner, feed_end
FROM stampline_shadow.watermarks WHERE projection = $1
ON CONFLICT (projection, partition) DO UPDATE
SET feed_offset = excluded.feed_offset, input_offset = excluded.input_offset
WHERE live.feed_offset <> excluded.feed_offset

-- name: take_back_watermarks
-- The old watermarks of projection $1 become those of a shadow.
INSERT INTO stampline_shadow.watermarks SELECT * FROM stampline_old.watermarks WHERE projection = $1

-- name: forget_watermarks
-- The copy of projection $1 is no more.
DELETE FROM stampline_shadow.watermarks WHERE projection = $1

-- name: drop_contents_seen
DROP TABLE IF EXISTS stampline_shadow.contents_seen

-- name: copies
-- The tables of projections $1 in all three schemas, with about how many rows they have.
SELECT space.nspname AS schema, class.relname AS projection,
       (
           SELECT coalesce(sum(pg_stat_get_live_tuples(part.oid)), 0)::bigint
           FROM pg_class AS part
           WHERE part.oid = class.oid OR part.oid IN (SELECT inhrelid FROM pg_inherits WHERE inhparent = class.oid)
       ) AS rows
FROM pg_class AS class
JOIN pg_namespace AS space ON space.oid = class.relnamespace
WHERE space.nspname IN ('stampline', 'stampline_shadow', 'stampline_old')
  AND class.relname = ANY ($1::text[]) AND class.relkind IN ('r', 'p')

-- name: all_marks
-- Where the projections stand in all three schemas.
SELECT schema, projection, sum(feed_offset)::bigint AS feed_offsets, min(input_offset) AS input_offset_min,
       max(input_offset) AS input_offset_max, max(updated_at) AS updated_at
FROM (
    SELECT 'stampline' AS schema, projection, feed_offset, input_offset, updated_at FROM stampline.watermarks
    UNION ALL
    SELECT 'stampline_shadow', projection, feed_offset, input_offset, updated_at FROM stampline_shadow.watermarks
    UNION ALL
    SELECT 'stampline_old', projection, feed_offset, input_offset, updated_at FROM stampline_old.watermarks
) AS mark
GROUP BY schema, projection

-- name: holders
-- Who has been in a transaction with the live table of projection $1, its partitions or the views on it, or with the
-- lock $2 of all who write: oldest first. How long is not told of other people's sessions to everybody.
SELECT activity.pid, activity.usename AS role, activity.application_name AS application, activity.state,
       activity.backend_type = 'autovacuum worker' AS is_autovacuum,
       extract(epoch FROM clock_timestamp() - activity.xact_start)::double precision AS seconds
FROM pg_stat_activity AS activity
WHERE activity.pid <> pg_backend_pid() AND activity.pid IN (
    SELECT lock.pid
    FROM pg_locks AS lock
    WHERE lock.granted AND (
        lock.locktype = 'advisory' AND (lock.classid::bigint << 32) | lock.objid::bigint = $2
        OR lock.locktype = 'relation' AND lock.relation IN (
            SELECT to_regclass(format('stampline.%I', $1::text))
            UNION ALL
            SELECT inhrelid FROM pg_inherits WHERE inhparent = to_regclass(format('stampline.%I', $1::text))
            UNION ALL
            SELECT rule.ev_class
            FROM pg_rewrite AS rule
            JOIN pg_depend AS link ON link.classid = 'pg_rewrite'::regclass AND link.objid = rule.oid
            WHERE link.refclassid = 'pg_class'::regclass AND link.refobjid = to_regclass(format('stampline.%I', $1::text))
        )
    )
)
ORDER BY activity.xact_start, activity.pid
