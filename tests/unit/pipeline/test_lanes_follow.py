"""What lanes ask of a role that also follows the changelogs of other nodes' partitions, and in which order."""

from __future__ import annotations

import asyncio

import pytest
from faust.types import TP

from pipeline.app import RoleApp
from pipeline.lanes import Follower, Lanes
from pipeline.settings import Settings
from tests.lane_fakes import A, B, FakeConsumer, FakeRole, until, waiting
from tests.probe_node import Probe

pytestmark = [pytest.mark.unit, pytest.mark.usefixtures("short_pauses")]

CHANGELOG_A, CHANGELOG_B = TP("changelog", A.partition), TP("changelog", B.partition)


async def test_standbys_are_kept_and_followed_before_any_lane_opens(consumer: FakeConsumer) -> None:
    """What a node stands by for is not among what `retain` drops."""
    consumer.lanes.assign({A}, {CHANGELOG_B})
    await until(lambda: consumer.lanes.ready)

    assert consumer.role.retained == [{A, CHANGELOG_B}]
    assert consumer.role.followed == {CHANGELOG_B}
    assert consumer.role.order == ["retained", "followed", "opening"]


async def test_following_has_stopped_before_a_lane_of_the_same_partition_opens(consumer: FakeConsumer) -> None:
    """A rebalance that swaps the partitions of two nodes: `end` returns when nothing is followed any more."""
    gate = asyncio.Event()
    role = consumer.role
    consumer.lanes.assign({A}, {CHANGELOG_B})
    await until(lambda: consumer.lanes.ready)
    role.unfollowing.append(waiting(gate))

    ending = asyncio.create_task(consumer.lanes.end())
    await until(lambda: role.order[-1] == "closed")
    assert not ending.done()
    gate.set()
    await ending
    assert role.followed == set()
    consumer.lanes.assign({B}, {CHANGELOG_A})
    await until(lambda: consumer.lanes.ready)

    assert role.order == ["retained", "followed", "opening", "closed", "unfollowed", "retained", "followed", "opening"]


async def test_a_node_that_only_stands_by_stops_following_too(consumer: FakeConsumer) -> None:
    """It is ready without a lane, and in the end it keeps nothing."""
    consumer.lanes.assign(set(), {CHANGELOG_A})
    assert consumer.lanes.ready
    await consumer.lanes.aclose()
    assert consumer.role.order == ["retained", "followed", "unfollowed", "retained"]
    assert consumer.role.retained == [{CHANGELOG_A}, set()]


async def test_a_role_without_a_table_is_asked_for_nothing() -> None:
    """It has neither of the two methods."""
    probe = Probe()
    lanes = Lanes(probe, FakeConsumer(Settings()), Settings())
    lanes.assign(set())
    await lanes.aclose()
    assert not isinstance(probe, Follower)


@pytest.mark.parametrize(("role", "replicas"), [(FakeRole(), 1), (Probe(), 0)], ids=["with a table", "without"])
async def test_the_assignor_gives_standbys_to_roles_with_a_table(role: FakeRole | Probe, replicas: int) -> None:
    """TABLE_STANDBY_REPLICAS reaches Faust's assignor, but not that of a role that would keep nothing."""
    app = RoleApp("standbys", Settings(table_standby_replicas=1), role, transactions=True)
    assert app.assignor.replicas == replicas
