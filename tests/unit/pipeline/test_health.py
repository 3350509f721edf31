"""The health pages: what a node's state makes of them, and how `status` finds and reads a node."""

from __future__ import annotations

import asyncio
import types
from typing import Any

import orjson
import pytest
from aiohttp import ClientSession
from aiohttp.test_utils import TestClient, TestServer
from aiohttp.web import Application, Request, Response, json_response
from aiokafka.coordinator.protocol import ConsumerProtocolMemberAssignment, ConsumerProtocolMemberMetadata
from faust.assignor.client_assignment import ClientAssignment, ClientMetadata
from faust.types import TP
from yarl import URL

from pipeline.breaker import State
from pipeline.errors import PositionLost, ServiceUnavailable, StamplineError
from pipeline.health import NodeState, RoleState, add_pages, has_failed, health, readiness
from pipeline.settings import Settings
from pipeline.status import NodeStatus, Status, ask, read_members
from tests.lane_fakes import A, B, FakeConsumer, failing, make_consumer, until, waiting

pytestmark = pytest.mark.unit

LIVE = RoleState({1: "live", 0: "live"}, ready=True, reaches_kafka=True)


def make_state(*, breaker: State | None = None, started: bool = True, **roles: RoleState) -> NodeState:
    """Make the state of a node; one that is not told of has a hasher without fault."""
    return NodeState("host-7", roles or {"hasher": LIVE}, breaker, started=started, uptime_seconds=3600.9)


def failed(fault: StamplineError, *, uses_database: bool = False, reaches_kafka: bool = True) -> RoleState:
    """Make a role with a failing partition."""
    return RoleState(
        {0: "live", 1: str(fault)},
        ready=False,
        reaches_kafka=reaches_kafka,
        faults=[fault],
        uses_database=uses_database,
    )


def test_a_node_without_fault_is_healthy() -> None:
    """The answer has exactly this shape; what a node does not use is disabled."""
    assert health(make_state()) == {
        "status": "healthy",
        "components": {"database": "disabled", "cache": "disabled", "kafka": "healthy"},
        "uptime_seconds": 3600,
    }


@pytest.mark.parametrize(
    ("breaker", "database", "status"),
    [
        ("closed", "healthy", "healthy"),
        ("half_open", "degraded", "degraded"),
        ("open", "unhealthy", "unhealthy"),
        (None, "disabled", "healthy"),
    ],
)
def test_the_breaker_tells_of_the_database(breaker: State | None, database: str, status: str) -> None:
    """An open breaker makes the node unhealthy, a half open one degraded."""
    answer = health(make_state(breaker=breaker))

    assert (answer["components"]["database"], answer["status"]) == (database, status)


@pytest.mark.parametrize(
    ("role", "kafka"),
    [
        (RoleState({}, ready=False, reaches_kafka=False), "degraded"),
        (RoleState({0: "live"}, ready=True, reaches_kafka=False), "degraded"),
        (failed(ServiceUnavailable("Kafka does not answer")), "degraded"),
        (failed(PositionLost()), "healthy"),
        # Either service: the coordinator decides.
        (failed(ServiceUnavailable("PostgreSQL"), uses_database=True), "healthy"),
        (failed(ServiceUnavailable("Kafka"), uses_database=True, reaches_kafka=False), "degraded"),
    ],
)
def test_kafka_away_is_degraded(role: RoleState, kafka: str) -> None:
    """Without an assignment, without a coordinator, or with a fault that can only be Kafka's; one role is enough."""
    answer = health(make_state(breaker="closed", hasher=LIVE, other=role))

    assert (answer["components"]["kafka"], answer["status"]) == (kafka, "degraded")


def test_a_partition_that_is_not_live_is_degraded() -> None:
    """Also where both services are well: the node says of itself that it does not do all its work."""
    answer = health(make_state(breaker="closed", reducer=failed(PositionLost())))

    assert answer["status"] == "degraded"
    assert answer["components"] == {"database": "healthy", "cache": "disabled", "kafka": "healthy"}


def test_readiness_tells_each_partition() -> None:
    """By role and number, in order, with what it is doing."""
    state = make_state(hasher=LIVE, reducer=failed(ServiceUnavailable("Kafka is away")))

    assert readiness(state) == {
        "ready": False,
        "node": "host-7",
        "roles": {"hasher": {"0": "live", "1": "live"}, "reducer": {"0": "live", "1": "Kafka is away"}},
        "standbys": {},
    }
    assert list(readiness(state)["roles"]["hasher"]) == ["0", "1"]


def test_readiness_tells_the_partitions_of_every_topic() -> None:
    """Those of the main topic by number alone and first, those of further topics by topic and number."""
    role = RoleState({10: "live", "dlq/10": "live", "dlq/9": "opening", 9: "live"}, ready=False, reaches_kafka=True)

    assert list(readiness(make_state(projector=role))["roles"]["projector"]) == ["9", "10", "dlq/9", "dlq/10"]


@pytest.mark.parametrize(
    ("status", "answer"),
    [("live", False), ("opening", False), ("recovering: 120000 records left", False), ("fenced: by another", True)],
)
def test_what_is_a_failure(status: str, answer: bool) -> None:
    """Neither being live nor being on the way there is one."""
    assert has_failed(status) is answer


@pytest.mark.parametrize(
    ("state", "codes"),
    [
        (make_state(), {"": 200, "/live": 200, "/ready": 200, "/startup": 200}),
        (make_state(breaker="open"), {"": 503, "/live": 200, "/ready": 200, "/startup": 200}),
        (make_state(breaker="half_open"), {"": 200, "/live": 200, "/ready": 200, "/startup": 200}),
        (
            make_state(started=False, hasher=RoleState({}, ready=False, reaches_kafka=False)),
            {"": 200, "/live": 200, "/ready": 503, "/startup": 503},
        ),
        (make_state(hasher=failed(PositionLost())), {"": 200, "/live": 200, "/ready": 503, "/startup": 200}),
    ],
)
async def test_the_codes_of_the_pages(state: NodeState, codes: dict[str, int]) -> None:
    """Probes look at nothing but the code."""
    web = Application()
    add_pages(web.router, lambda: state)
    async with TestClient(TestServer(web)) as client:
        found = {page: (await client.get(f"/health{page}")).status for page in codes}
        answer = await (await client.get("/health/ready")).json()

    assert found == codes
    assert answer == readiness(state)


def look(consumer: FakeConsumer) -> RoleState:
    """Look at lanes as a node does."""
    lanes = consumer.lanes
    return RoleState(
        lanes.status(), ready=lanes.ready, reaches_kafka=lanes.assigned, faults=lanes.faults, copies=lanes.copies()
    )


async def test_a_recovery_tells_how_far_it_is(consumer: FakeConsumer) -> None:
    """What a role reports while it opens a partition is on the page; the partitions beside it are live."""
    gate = asyncio.Event()
    consumer.role.opening[B].append(waiting(gate))
    assert not look(consumer).reaches_kafka
    consumer.lanes.assign({A, B}, {TP("files-changelog", 2)})
    await until(lambda: consumer.lanes.status()[A.partition] == "live")
    consumer.lanes.report(B, "recovering: 120000 records left")

    assert readiness(make_state(reducer=look(consumer))) == {
        "ready": False,
        "node": "host-7",
        "roles": {"reducer": {"0": "live", "1": "recovering: 120000 records left"}},
        "standbys": {"reducer": {"2": "following, 3 records behind"}},
    }

    gate.set()
    await until(lambda: consumer.lanes.ready)
    assert readiness(make_state(reducer=look(consumer)))["ready"]


async def test_a_fault_is_known_until_the_partition_is_live_again(short_pauses: None) -> None:
    """A lane that cannot be opened has its error in the page and its kind beside it, then neither."""
    consumer = make_consumer()
    gate = asyncio.Event()
    consumer.role.opening[A] += [failing(ServiceUnavailable("Kafka is away")), waiting(gate)]
    consumer.lanes.assign({A})
    await until(lambda: consumer.lanes.faults)
    state = look(consumer)
    gate.set()
    await until(lambda: consumer.lanes.ready)

    assert state.partitions == {0: "Kafka is away"}
    assert [type(fault) for fault in state.faults] == [ServiceUnavailable]
    assert health(make_state(hasher=state))["components"]["kafka"] == "degraded"
    assert consumer.lanes.faults == []
    await consumer.lanes.aclose()


def described(*members: tuple[bytes, bytes]) -> Any:
    """Make a broker's description of a group with these members' metadata and assignments."""
    rows = [(f"member-{number}", "client", "/10.0.0.5", *member) for number, member in enumerate(members)]
    return types.SimpleNamespace(groups=[(0, "group", "Stable", "consumer", "faust", rows)])


def metadata(url: str) -> bytes:
    """Make what Faust tells the group about a member."""
    known = ClientMetadata(assignment=ClientAssignment(actives={}, standbys={}), url=url, changelog_distribution={})
    encoded: bytes = ConsumerProtocolMemberMetadata(3, ["file-stamps"], known.dumps()).encode()
    return encoded


def test_members_are_read_from_the_description_of_a_group() -> None:
    """The address is in Faust's metadata; of the partitions only those of the role's own topics count, and those that
    are not of its main topic are called by their topic too, without the prefix.
    """
    given = [("t-dlq", [1, 0]), ("t-file-stamps", [2, 0]), ("changelog", [0, 1, 2, 3])]
    assignment = ConsumerProtocolMemberAssignment(3, given, b"").encode()
    response = described((metadata("http://host@127.0.0.1:6067"), assignment))
    settings = Settings(kafka_topic_prefix="t-")

    assert read_members(settings, response, ["file-stamps"]) == [(URL("http://host@127.0.0.1:6067"), [0, 2])]
    assert read_members(settings, response, ["file-stamps", "dlq"]) == [
        (URL("http://host@127.0.0.1:6067"), [0, 2, "dlq/0", "dlq/1"])
    ]


@pytest.mark.parametrize(
    "said",
    [
        b"",
        b"\x00",
        ConsumerProtocolMemberMetadata(0, [], b"").encode(),
        ConsumerProtocolMemberMetadata(0, [], orjson.dumps({"url": 7})).encode(),
        ConsumerProtocolMemberMetadata(0, [], orjson.dumps({"url": "http://["})).encode(),
    ],
)
def test_members_that_cannot_be_read_are_left_out(said: bytes) -> None:
    """One that is about to join, a broker that does not tell, another program's group: none is an error."""
    response = described((said, b""), (metadata("http://h@127.0.0.1:1"), b""))

    assert read_members(Settings(), response, ["file-stamps"]) == [(URL("http://h@127.0.0.1:1"), [])]


@pytest.mark.parametrize(
    ("body", "node"),
    [
        ({"ready": True, "node": "host-7", "roles": {"reducer": {"0": "live"}}}, True),
        ({"ready": True, "node": "host-8", "roles": {"reducer": {"0": "live"}}}, False),
        ({"ready": True, "node": "host-7", "roles": {"baker": {"zero": 1}}}, False),
        ({"ready": True, "node": "host-7", "roles": {"reducer": {"zero": "live"}}}, False),
        ({"ready": True, "node": "host-7", "roles": {"reducer": {"dlq/0": "live", "0": "live"}}}, True),
        ({"files": []}, False),
    ],
)
async def test_only_the_node_itself_is_believed(body: dict[str, Any], node: bool) -> None:
    """Its port may be another node's by now, or another program's; the group's word then stands."""
    web = Application()

    async def answer(_request: Request) -> Response:
        return json_response(body, status=503)

    web.router.add_get("/health/ready", answer)
    async with TestServer(web) as server, ClientSession() as session:
        found = await ask(session, URL(f"http://host-7@127.0.0.1:{server.port}"), {"reducer": [0, 2]})

    unknown = {"reducer": {"0": "not reachable", "2": "not reachable"}}
    assert found.node == "host-7"
    assert (found.ready, found.roles) == ((True, body["roles"]) if node else (None, unknown))


@pytest.mark.parametrize("url", ["http://host-7@127.0.0.1:1", "http://host-7@example.invalid:80", "host-7", ""])
async def test_a_node_that_cannot_be_asked_is_no_error(url: str) -> None:
    """It has gone, or it is on another host, or what the group tells is no address."""
    async with ClientSession() as session:
        found = await ask(session, URL(url), {"hasher": [1]})

    assert (found.ready, found.roles) == (None, {"hasher": {"1": "not reachable"}})


@pytest.mark.parametrize(
    ("kafka", "said", "healthy"),
    [
        ("ok", "live", True),
        ("ok", "recovering: 5 records left", True),
        ("ok", "not reachable", True),
        ("ok", "PostgreSQL is left alone", False),
        ("away", "live", False),
    ],
)
def test_what_status_calls_unhealthy(kafka: str, said: str, healthy: bool) -> None:
    """A service that is away and a partition that has failed; not one that is on its way or cannot be asked for."""
    assert (
        Status(kafka, "ok", [], [NodeStatus("h-7", "http://127.0.0.1:1", None, {"r": {"0": said}})]).healthy is healthy
    )
