"""Members of a consumer group that come and go: static members, namesakes, and who takes over from whom."""

from __future__ import annotations

import json
from functools import partial
from typing import Any

import pytest

from tests.fix_road import NodeProcess, Road, make_events

pytestmark = pytest.mark.integration


def logged(node: NodeProcess, event: str) -> list[dict[str, Any]]:
    """Return every line of a node's log with this event."""
    lines = [line for line in node.log.read_text().splitlines() if line.startswith("{") and f'"{event}"' in line]
    return [entry for entry in map(json.loads, lines) if entry["event"] == event]


def has_partitions(node: NodeProcess, count: int) -> bool:
    """Tell whether the last assignment of a node was of so many partitions."""
    assigned = logged(node, "partitions_assigned")
    return bool(assigned) and len(assigned[-1]["partitions"]) == count


async def test_a_planned_restart_of_a_static_member_moves_no_partition(road: Road) -> None:
    """A reducer with a name of its own stops and starts again; the other one is not disturbed, nothing is lost."""
    road.start("hasher", "projector")
    first = road.start("reducer", KAFKA_GROUP_INSTANCE_ID="one", KAFKA_SESSION_TIMEOUT_MS="30000")
    second = road.start("reducer", KAFKA_GROUP_INSTANCE_ID="two", KAFKA_SESSION_TIMEOUT_MS="30000")
    await road.until(lambda: has_partitions(first, 2) and has_partitions(second, 2))
    before = logged(first, "partitions_assigned")[-1]["partitions"]
    undisturbed = len(logged(second, "partitions_assigned"))
    events = make_events(6_000, 500, seed=31)
    positions = await road.send(events[:3_000])
    await road.until_visible(positions)

    assert first.terminate() == 0
    again = road.start("reducer", KAFKA_GROUP_INSTANCE_ID="one", KAFKA_SESSION_TIMEOUT_MS="30000")
    positions += await road.send(events[3_000:])
    await road.until_visible(positions)

    assert [entry["partitions"] for entry in logged(again, "partitions_assigned")] == [before]
    assert len(logged(second, "partitions_assigned")) == undisturbed
    await road.assert_exact(events, positions)


async def test_a_static_member_that_was_killed_takes_its_partitions_back_at_once(road: Road) -> None:
    """After kill -9 the next process of the same name goes on, without waiting for the session of the dead one."""
    road.start("hasher", "projector")
    first = road.start("reducer", KAFKA_GROUP_INSTANCE_ID="one", KAFKA_SESSION_TIMEOUT_MS="300000")
    await road.until(lambda: has_partitions(first, 4))
    events = make_events(6_000, 500, seed=32)
    positions = await road.send(events[:3_000])
    await road.until(partial(first.has_logged, '"batch_committed"'))

    first.kill()
    road.start("reducer", KAFKA_GROUP_INSTANCE_ID="one", KAFKA_SESSION_TIMEOUT_MS="300000")
    positions += await road.send(events[3_000:])
    await road.until_visible(positions)

    await road.assert_exact(events, positions)


async def test_two_processes_of_one_name_are_told(road: Road) -> None:
    """Of two processes with the same KAFKA_GROUP_INSTANCE_ID one ends with a line that says so; nothing is lost."""
    road.start("hasher", "projector")
    rivals = [road.start("reducer", KAFKA_GROUP_INSTANCE_ID="same", KAFKA_SESSION_TIMEOUT_MS="1000") for _ in range(2)]
    events = make_events(2_000, 100, seed=33)
    positions = await road.send(events)
    await road.until(lambda: any(rival.process.poll() == 1 for rival in rivals), may_fail=rivals)
    loser = next(rival for rival in rivals if rival.process.poll() == 1)
    # Rivals as quick as these may both give way.
    road.start("reducer", KAFKA_SESSION_TIMEOUT_MS="1000")
    await road.until_visible(positions, may_fail=rivals)

    assert loser.has_logged("another process uses KAFKA_GROUP_INSTANCE_ID=same too")
    await road.assert_exact(events, positions)
