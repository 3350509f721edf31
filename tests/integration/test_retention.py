"""Old months of the history can be dropped, and nobody takes them for lost."""

from __future__ import annotations

import json

import pytest

from pipeline.verify import all_faults, verify
from tests.fix_road import Road, make_events
from tests.integration.test_cli import stampline

pytestmark = pytest.mark.integration

#: Makes what is there three years old, in a month of its own.
_AGE = """
SELECT stampline.ensure_history_partitions(now() - interval '3 years');
UPDATE stampline.file_history SET projected_at = projected_at - interval '3 years'
"""


async def test_old_months_are_dropped_and_known(road: Road) -> None:
    """The command names what it would drop, drops it, and `verify` and `wait_for` still tell the truth."""
    road.start("hasher", "reducer", "projector")
    events = make_events(400, 40, seed=61)
    old = await road.send(events[:200])
    await road.until_visible(old)
    for statement in _AGE.split(";"):
        await road.fetch(statement)
    new = await road.send(events[200:])
    await road.until_visible(new)

    told = stampline(road.settings, "projections", "drop-history", "--before", "2026-01-01", "--dry-run", "--json")
    kept = await road.fetch("SELECT count(*) FROM file_history")
    asked = stampline(road.settings, "projections", "drop-history", "--before", "2026-01-01")
    done = stampline(road.settings, "projections", "drop-history", "--before", "2026-01-01", "--yes", "--json")
    left = await road.fetch("SELECT count(*) FROM file_history")
    again = stampline(road.settings, "projections", "drop-history", "--before", "2026-01-01", "--yes")
    answers = await road.fetch(
        "SELECT wait_for(format('file-events:%s:%s', p, o), interval '0') AS answer "
        "FROM unnest($1::integer[], $2::bigint[]) AS token (p, o)",
        [position.partition for position in old],
        [position.offset for position in old],
    )

    tables = json.loads(told.stdout)["tables"]
    assert json.loads(told.stdout)["dropped"] is False
    assert json.loads(done.stdout) == {"dropped": True, "tables": tables}
    assert len(tables) == 2
    assert (kept[0]["count"], left[0]["count"]) == (400, 200)
    assert (asked.returncode, again.returncode) == (130, 0)
    assert "no month of the history ended before 2026-01-01" in again.stderr
    assert {row["answer"] for row in answers} == {"reached"}
    assert all_faults(await verify(road.settings)) == []
