"""What analysts usually ask is answered by an index; the module of this name in tests/performance measures it."""

from __future__ import annotations

import json
from typing import Any, Final

import asyncpg
import pytest

pytestmark = pytest.mark.integration

#: The usual questions; the uri, the digest and the partition are those of a row in the middle.
QUERIES: Final = {
    "one file": "SELECT * FROM files WHERE uri = 'file:///data/777.bin'",
    "its history": "SELECT * FROM file_history WHERE uri = 'file:///data/777.bin' ORDER BY recorded_at",
    "files of a content": "SELECT uri FROM files WHERE digest = encode(sha256('777'), 'hex')",
    "top duplicates": "SELECT * FROM duplicates ORDER BY wasted_bytes DESC LIMIT 20",
    "activity of the last hour": "SELECT * FROM activity WHERE minute >= now() - interval '1 hour' ORDER BY minute",
    "lag": "SELECT * FROM projection_lag",
    "an input": "SELECT outcome FROM file_history WHERE input_partition = 1 AND input_offset = 97",
    "newest dead letters": "SELECT topic, reason, dead_at FROM dead_letters ORDER BY dead_at DESC LIMIT 20",
}
#: Tables that are large in earnest; nobody reads one of them from end to end for a question above.
_LARGE: Final = ("files", "file_history", "contents", "activity", "dead_letters")
_PARTITIONS: Final = 8

_FILL = """
INSERT INTO stampline.files
    (uri_key, version, size, occurred_at, stamped_at, projected_at, input_offset, input_partition, deleted, uri,
     namespace, op, event_id, digest)
SELECT md5(number::text)::uuid, 1, 1000, now(), now(), now(), number / {partitions}, number % {partitions}, false,
       format('file:///data/%s.bin', number), 'default', 'created', format('event-%s', number),
       sha256((number % ({files} * 9 / 10))::text::bytea)
FROM generate_series(0, {files} - 1) AS number;

INSERT INTO stampline.file_history
    (input_offset, version, size, occurred_at, recorded_at, projected_at, input_partition, uri, namespace, event_id, op,
     outcome, digest)
SELECT input_offset, version, size, occurred_at, now(), projected_at, input_partition, uri, namespace, event_id, op,
       'committed', digest
FROM stampline.files;

INSERT INTO stampline.contents (digest, size, copies, first_seen_at, last_seen_at)
SELECT digest, max(size), count(*), now(), now() FROM stampline.files GROUP BY digest;

INSERT INTO stampline.activity
SELECT date_trunc('minute', now()) - make_interval(mins => minute), 10, 10000, 10, 0, 0, 0, 0, 0, 0, partition,
       'default', op
FROM generate_series(0, least({files} / 32, 43200)) AS minute, generate_series(0, {partitions} - 1) AS partition,
     unnest(ARRAY['created', 'modified', 'deleted', 'moved']) AS op;

INSERT INTO stampline.dead_letters
    ("offset", dead_at, letter_offset, "partition", attempts, topic, reason, error, status, headers)
SELECT number, now() - make_interval(secs => number), number, number % {partitions}, 1, 'file-events', 'undecodable',
       'no JSON', 'open', '[]'
FROM generate_series(0, {files} / 100) AS number;

INSERT INTO stampline.watermarks (projection, partition, feed_offset, input_offset, updated_at, heartbeat_at, owner)
SELECT projection, partition, 1000, 1000, now(), now(), 'node'
FROM generate_series(0, {partitions} - 1) AS partition,
     unnest(ARRAY['files', 'file_history', 'contents', 'activity']) AS projection
"""


async def fill(connection: asyncpg.Connection[Any], files: int) -> None:
    """Make so many files, a tenth of which have a twin, with all that belongs to them."""
    await connection.execute(_FILL.format(files=files, partitions=_PARTITIONS))
    await connection.execute("VACUUM ANALYZE")


async def explain(connection: asyncpg.Connection[Any], query: str) -> set[str]:
    """Return the large tables that PostgreSQL would read from end to end for a query."""
    plan = json.loads(await connection.fetchval(f"EXPLAIN (FORMAT JSON) {query}"))
    scanned = set()
    pending = [plan[0]["Plan"]]
    while pending:
        node = pending.pop()
        pending += node.get("Plans", [])
        if node["Node Type"] == "Seq Scan" and node["Relation Name"].startswith(_LARGE):
            scanned.add(node["Relation Name"])
    return scanned


async def test_the_usual_questions_use_an_index(database: str) -> None:
    """No large table is read from end to end, and each question finds something."""
    connection = await asyncpg.connect(database)
    try:
        await fill(connection, 50_000)
        this_month = await connection.fetchval("SELECT 'file_history_' || to_char(now() AT TIME ZONE 'UTC', 'YYYY_MM')")
        for name, query in QUERIES.items():
            # Next month's partition is empty: reading it is the quickest way to find nothing.
            scanned = await explain(connection, query)
            assert not {table for table in scanned if table == this_month or "history" not in table}, name
            assert await connection.fetch(query), name
    finally:
        await connection.close()
