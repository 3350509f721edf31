"""Standbys on a real broker: a node that follows the partitions of another one takes over by reading the rest."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.verify import all_faults, verify
from tests.fix_road import NodeProcess, Road, make_events
from tests.integration.test_membership import has_partitions, logged

pytestmark = pytest.mark.integration

KEYS = 3_000
#: Two batches of the reducer are a few hundred records at the most; all would be one for each key and batch.
FEW = KEYS // 4


class Nodes:
    """Reducers of one deployment, each with a store of its own, that stand by for each other."""

    def __init__(self, road: Road, kind: str, folder: Path) -> None:
        self._road = road
        self._kind = kind
        self._folder = folder

    def start(self, name: str) -> NodeProcess:
        """Start the node of this name, or start it again."""
        return self._road.start(
            "reducer",
            TABLE_STANDBY_REPLICAS="1",
            TABLE_STORE=self._kind,
            TABLE_DIR=str(self._folder / name),
            KAFKA_SESSION_TIMEOUT_MS="2000",
        )


@pytest.fixture(params=["memory", "rocksdb"])
def nodes(request: pytest.FixtureRequest, road: Road, tmp_path: Path) -> Nodes:
    """Reducers with stores of each kind; hasher and projector run."""
    road.start("hasher", "projector")
    return Nodes(road, request.param, tmp_path)


def active(node: NodeProcess) -> set[int]:
    """Return the partitions that were assigned to a node last."""
    return set(logged(node, "partitions_assigned")[-1]["partitions"])


def follows_the_rest(node: NodeProcess) -> bool:
    """Tell whether a node has two partitions and has begun to follow the two others since it was given them."""
    if not has_partitions(node, 2):
        return False
    since = logged(node, "partitions_assigned")[-1]["timestamp"]
    followed = {line["partition"] for line in logged(node, "standby_following") if line["timestamp"] >= since}
    return active(node) | followed == {0, 1, 2, 3}


@pytest.mark.parametrize("ending", ["killed", "stopped"])
async def test_a_takeover_reads_only_the_difference(road: Road, nodes: Nodes, ending: str) -> None:
    """SIGKILL or SIGTERM: the other has nearly all that it needs; when the first comes back, it follows again."""
    first, second = nodes.start("first"), nodes.start("second")
    await road.until(lambda: follows_the_rest(first) and follows_the_rest(second))
    assert active(first).isdisjoint(active(second))
    events = make_events(12_000, KEYS, seed=41)
    positions = await road.send(events[:8_000])
    await road.until_visible(positions)

    taken = active(first)
    before = len(logged(second, "partition_recovered"))
    if ending == "killed":
        first.kill()
    else:
        assert first.terminate() == 0
    positions += await road.send(events[8_000:10_000])
    await road.until_visible(positions)

    recovered = logged(second, "partition_recovered")[before:]
    assert {line["partition"] for line in recovered} == {0, 1, 2, 3}
    assert sum(line["records"] for line in recovered if line["partition"] in taken) < FEW
    assert sum(line["keys"] for line in recovered[-4:]) > KEYS * 0.9

    again = nodes.start("first")
    await road.until(lambda: follows_the_rest(again) and follows_the_rest(second))
    positions += await road.send(events[10_000:])
    await road.until_visible(positions)

    await road.assert_exact(events, positions)
    assert all_faults(await verify(road.settings)) == []
    assert [node.terminate() for node in (again, second)] == [0, 0]
    assert [line for node in road.nodes for line in logged(node, "standby_failed")] == []


async def test_a_node_alone_has_no_standby(road: Road, tmp_path: Path) -> None:
    """One node alone has nobody to stand by for it; TABLE_STANDBY_REPLICAS is a wish."""
    road.start("hasher", "projector", TABLE_STANDBY_REPLICAS="1")
    reducer = road.start("reducer", TABLE_STANDBY_REPLICAS="1")
    events = make_events(500, 100, seed=42)
    positions = await road.send(events)
    await road.until_visible(positions)

    assert active(reducer) == {0, 1, 2, 3}
    assert logged(reducer, "standby_following") == []
    await road.assert_exact(events, positions)
