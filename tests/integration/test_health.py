"""What nodes say of themselves: their health pages and `stampline status`, also while a service is away."""

from __future__ import annotations

import asyncio
import json
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from pipeline.embedded import run_services
from pipeline.status import PartitionStatus, read_status
from pipeline.topics import create_topics
from tests.fix_proxy import TcpProxy, through
from tests.fix_road import DEADLINE_SECONDS, NodeProcess, Road, ending, environment, make_events
from tests.fix_services import MakeSettings, SharedServices

pytestmark = pytest.mark.integration

ROLES = ("hasher", "reducer", "retry", "projector")
PARTITIONS = [str(number) for number in range(4)]
ALL_LIVE = dict.fromkeys(PARTITIONS, "live")
#: What the projector says: it reads the dead letters too.
PROJECTOR_LIVE = ALL_LIVE | {f"file-events-dlq/{number}": "live" for number in PARTITIONS}


def find_web(node: NodeProcess) -> str | None:
    """Return where a node's pages are, as its log tells; None until it does."""
    lines = [line for line in node.log.read_text().splitlines() if '"node_started"' in line]
    return json.loads(lines[0])["web"] if lines else None


def name(node: NodeProcess) -> str:
    """Return what a node calls itself."""
    return f"{socket.gethostname()}-{node.process.pid}"


async def until_started(road: Road, node: NodeProcess) -> str:
    """Wait until a node has started, and return where its pages are."""
    await road.until(lambda: find_web(node))
    web = find_web(node)
    assert web is not None
    return web


async def ask(web: str, page: str = "") -> tuple[int, Any]:
    """Return the code and the answer of a page."""
    timeout = aiohttp.ClientTimeout(DEADLINE_SECONDS)
    async with aiohttp.ClientSession(timeout=timeout) as session, session.get(f"{web}/health{page}") as response:
        return response.status, await response.json()


async def until_ready(road: Road, *nodes: NodeProcess) -> list[str]:
    """Wait until nodes are ready, and return where their pages are."""
    webs = [await until_started(road, node) for node in nodes]

    async def ready() -> bool:
        return all([(await ask(web, "/ready"))[0] == 200 for web in webs])

    await road.until(ready)
    return webs


async def status(road: Road, *options: str) -> tuple[int, str]:
    """Run `stampline status` and return its exit code and what it printed."""
    done = await asyncio.to_thread(
        subprocess.run,
        [sys.executable, "-m", "pipeline", "status", *options],
        cwd=Path(__file__).parents[2],
        env=environment(road.settings) | {"COLUMNS": "200"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=DEADLINE_SECONDS,
        check=False,
    )
    return done.returncode, done.stdout


async def test_a_node_tells_when_it_is_ready(road: Road) -> None:
    """All roles of a process answer on one address, each partition by its number; `node_ready` is logged once."""
    node = road.start(*ROLES)
    [web] = await until_ready(road, node)
    _, ready = await ask(web, "/ready")
    code, health = await ask(web)

    roles = {"hasher": ALL_LIVE, "reducer": ALL_LIVE, "retry": ALL_LIVE, "projector": PROJECTOR_LIVE}
    assert ready == {"ready": True, "node": name(node), "roles": roles, "standbys": {}}
    assert code == 200
    assert health.pop("uptime_seconds") >= 0
    assert health == {
        "status": "healthy",
        "components": {"database": "healthy", "cache": "disabled", "kafka": "healthy"},
    }
    assert [(await ask(web, page))[0] for page in ("/live", "/startup")] == [200, 200]
    assert node.terminate() == 0
    assert node.log.read_text().count('"node_ready"') == 1


async def test_status_shows_the_nodes(road: Road, services: SharedServices) -> None:
    """Each process once, with its partitions; one that was killed is not reachable, which is no failure."""
    if services.kind == "embedded":
        pytest.skip("the embedded broker does not tell who is in a group")
    # One that is killed is in its group for as long as its session.
    session = {"KAFKA_SESSION_TIMEOUT_MS": "300000"}
    nodes = [road.start("hasher", "projector", **session), road.start("reducer", **session)]
    webs = await until_ready(road, *nodes)
    code, output = await status(road, "--json")
    _, table = await status(road)
    found = {node["node"]: node for node in json.loads(output)["nodes"]}

    assert code == 0
    assert len(set(webs)) == 2
    assert {who: (node["web"], node["ready"], node["roles"]) for who, node in found.items()} == {
        name(nodes[0]): (webs[0], True, {"hasher": ALL_LIVE, "projector": PROJECTOR_LIVE}),
        name(nodes[1]): (webs[1], True, {"reducer": ALL_LIVE}),
    }
    assert [line.split() for line in table.splitlines() if line.startswith("reducer")] == [
        ["reducer", number, "live", name(nodes[1]), webs[1]] for number in PARTITIONS
    ]

    nodes[1].kill()
    code, output = await status(road, "--json")
    [gone] = [node for node in json.loads(output)["nodes"] if node["node"] == name(nodes[1])]

    assert code == 0
    assert (gone["ready"], gone["roles"]) == (None, {"reducer": dict.fromkeys(PARTITIONS, "not reachable")})


async def test_postgres_away_and_back(road: Road, proxy: TcpProxy, services: SharedServices) -> None:
    """The projector says what is wrong, for each partition too, and falls behind; then everything goes on alone."""
    road.start("hasher", "reducer")
    projector = road.start(
        "projector",
        POSTGRES_DSN=through(road.settings.postgres_url, proxy),
        DB_CIRCUIT_BREAKER_FAILURE_THRESHOLD="2",
        DB_CIRCUIT_BREAKER_RECOVERY_TIMEOUT="1",
    )
    [web] = await until_ready(road, projector)
    events = make_events(400, 40, seed=41)
    positions = await road.send(events[:200])
    await road.until_visible(positions)

    await proxy.refuse()
    positions += await road.send(events[200:])

    async def unhealthy() -> bool:
        code, answer = await ask(web)
        return (code, answer["status"], answer["components"]["database"]) == (503, "unhealthy", "unhealthy")

    async def told_why() -> bool:
        code, answer = await ask(web, "/ready")
        # Where no dead letter comes, nothing has failed.
        partitions = answer["roles"]["projector"]
        return code == 503 and all("PostgreSQL at" in partitions[number] for number in PARTITIONS)

    await road.until(unhealthy)
    await road.until(told_why)
    assert [(await ask(web, page))[0] for page in ("/live", "/startup")] == [200, 200]
    assert (await ask(web))[1]["components"]["kafka"] == "healthy"
    assert '"breaker_opened"' in projector.log.read_text()
    assert sum(partition.behind for partition in await hashed(road, 400)) == 200
    if services.kind != "embedded":
        code, table = await status(road)
        assert code == 3
        assert f"PostgreSQL at {proxy.address}" in table

    await proxy.heal()
    await road.until_visible(positions)
    await until_ready(road, projector)
    await road.assert_exact(events, positions)
    assert (await read_status(road.settings)).healthy


async def hashed(road: Road, events: int) -> list[PartitionStatus]:
    """Wait until so many events are through the hasher and the reducer, and return how far each partition is."""
    found: list[PartitionStatus] = []

    async def reached() -> bool:
        found[:] = (await read_status(road.settings)).partitions
        return sum(partition.events_end for partition in found) == events and all(
            partition.hashed == partition.events_end and partition.reduced == partition.stamps_end
            for partition in found
        )

    await road.until(reached)
    return found


async def test_kafka_away_and_back(make_settings: MakeSettings, services: SharedServices, tmp_path: Path) -> None:
    """A node whose broker went away is degraded and not ready for an end; it is ready again when the broker is."""
    if services.kind == "embedded":
        pytest.skip("the embedded broker keeps nothing over a restart")
    with run_services(broker="kafka", database=False, data=None, say=print) as own:
        settings = make_settings(
            kafka_bootstrap_servers=own.kafka_bootstrap_servers,
            kafka_topic_partitions=4,
            kafka_session_timeout_ms=6000,
        )
        await create_topics(settings)
        with ending(Road(settings, tmp_path)) as road:
            [web] = await until_ready(road, road.start("hasher"))

            async def kafka(level: str) -> bool:
                code, answer = await ask(web)
                return code == 200 and answer["components"]["kafka"] == level

            await asyncio.to_thread(own.stop, "broker")
            await road.until(lambda: kafka("degraded"))
            assert (await ask(web, "/live"))[0] == 200
            await asyncio.to_thread(own.start, "broker")
            await road.until(lambda: kafka("healthy"))
            await until_ready(road, road.nodes[0])
