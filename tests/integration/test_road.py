"""The road of an event, end to end, on real services and in processes of their own."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sysconfig
from functools import partial
from pathlib import Path

import pytest
from blake3 import blake3

from pipeline.client import EventProducer, Position
from pipeline.embedded import run_services
from pipeline.kafka import partition_for
from pipeline.logreader import LogReader
from pipeline.scan import file_uri, scan
from pipeline.topics import create_topics, has_transactions
from pipeline.verify import all_faults, verify
from pipeline.worker import STOP_SECONDS, run_node
from tests.fix_road import Road, make_events
from tests.fix_services import MakeSettings

pytestmark = pytest.mark.integration

ROLES = ("hasher", "reducer", "projector")


_STANDARD_LIBRARY = Path(sysconfig.get_paths()["stdlib"]).resolve()


def digests_below(root: Path) -> dict[str, str]:
    """Return the digest of every regular file, as `find` and BLAKE3 know them."""
    found = subprocess.run(["find", str(root), "-type", "f", "-print0"], check=True, capture_output=True).stdout
    paths = [os.fsdecode(path) for path in found.split(b"\0")[:-1]]
    return {file_uri(path): blake3(Path(path).read_bytes()).hexdigest() for path in paths}


async def assert_verified(road: Road) -> None:
    """`stampline verify` finds nothing."""
    faults = all_faults(await verify(road.settings))

    assert faults == []


async def test_standard_library_becomes_rows(make_settings: MakeSettings, tmp_path: Path) -> None:
    """Every regular file of the standard library is one row with the BLAKE3 of its bytes, and there is no other row."""
    root = _STANDARD_LIBRARY
    road = Road(make_settings(allowed_roots=(root,)), tmp_path)
    await create_topics(road.settings)
    transactions = await has_transactions(road.settings)
    async with (
        run_node(road.settings, ROLES, transactions=transactions) as node,
        EventProducer(road.settings) as producer,
    ):
        await node.wait_until_ready()
        result = await scan([root], producer)
        await road.until_visible([Position(partition, offset - 1) for partition, offset in result.last_offsets.items()])

    expected = digests_below(root)
    rows = {row["uri"]: row["digest"] for row in await road.fetch("SELECT uri, digest FROM files WHERE NOT deleted")}

    assert result.files == len(expected)
    assert rows == expected
    await assert_verified(road)


async def test_second_nodes_join_and_the_result_is_exact(road: Road) -> None:
    """A second node of each role, started in the middle, takes partitions; every event is applied once, in order."""
    events = make_events(50_000, 2_000, seed=1)
    first = [road.start(role) for role in ROLES]
    half = len(events) // 2
    positions = await road.send(events[:half])
    await road.until(partial(first[2].has_logged, '"batch_committed"'))
    second = [road.start(role) for role in ROLES]
    positions += await road.send(events[half:])
    await road.until_visible(positions)
    for node in second:
        await road.until(partial(node.has_logged, '"partitions_assigned"'))
    more = make_events(2_000, 2_000, seed=2)
    positions += await road.send(more)
    await road.until_visible(positions)

    await road.assert_exact(events + more, positions)
    assert [node.has_logged('"hash_generated"') for node in (first[0], second[0])] == [True, True]
    assert [node.has_logged('"batch_committed"') for node in (*first[1:], *second[1:])] == [True] * 4
    await assert_verified(road)


async def test_sigterm_in_the_middle_and_start_again_is_exact(road: Road) -> None:
    """Every role is stopped by SIGTERM while events flow, exits with 0, and the next node goes on where it was."""
    events = make_events(30_000, 1_000, seed=3)
    positions = []
    for start in range(0, len(events), 10_000):
        nodes = [road.start(role) for role in ROLES]
        positions += await road.send(events[start : start + 10_000])
        projector = nodes[2]
        await road.until(partial(projector.has_logged, '"batch_committed"'))

        assert [node.terminate() for node in nodes] == [0, 0, 0]
    road.start(*ROLES)
    await road.until_visible(positions)

    await road.assert_exact(events, positions)
    await assert_verified(road)


async def test_bad_input_becomes_dead_letters_and_the_partition_goes_on(road: Road, tmp_path: Path) -> None:
    """Each bad input ends as a dead letter with its bytes and its reason; the good ones around it are applied."""
    folder = tmp_path / "folder"
    folder.mkdir()

    def event(uri: str, **fields: object) -> bytes:
        told = {"event_id": f"id of {uri}", "uri": uri, "op": "created", "occurred_at": "2026-11-23T09:00:00Z"}
        return json.dumps(told | fields).encode()

    gone = file_uri(str(folder / "gone"))
    bad = {
        "undecodable": (b"file:///a", b"\xff\x00 no JSON"),
        "content_missing": (gone.encode(), event(gone)),
        "content_forbidden": (b"file:///etc/passwd", event("file:///etc/passwd")),
        "invalid_event": (b"file:///n", event("file:///n", source="a\x00b", content="")),
        "too_large": (b"file:///big", event("file:///big", content="A" * 2 * 2**20)),
        "content_not_regular": (file_uri(str(folder)).encode(), event(file_uri(str(folder)))),
        "unknown_scheme": (b"gopher://a/b", event("gopher://a/b")),
        "wrong_key": (b"another", event("file:///k", content="")),
    }
    road.start(*ROLES)
    before = make_events(200, 50, seed=4)
    positions = await road.send(before)
    for key, value in bad.values():
        await road.send_raw(key, value, partition=partition_for(key, 4))
    after = make_events(200, 50, seed=5)
    positions += await road.send(after)
    await road.until_visible(positions)
    letters = await read_dead_letters(road)
    rejected = {
        row["uri"]: row["reason"]
        for row in await road.fetch("SELECT uri, reason FROM file_history WHERE outcome = 'rejected'")
    }

    assert {reason: (key, value) for reason, key, value in letters} == bad
    assert rejected == {
        gone: "content_missing",
        "file:///etc/passwd": "content_forbidden",
        "file:///n": "invalid_event",
        "file:///big": "too_large",
        file_uri(str(folder)): "content_not_regular",
        "gopher://a/b": "unknown_scheme",
        "file:///k": "wrong_key",
    }
    versions = {row["uri"]: row["version"] for row in await road.fetch("SELECT uri, version FROM files")}
    assert sum(versions.values()) == len(before) + len(after)
    await assert_verified(road)


async def read_dead_letters(road: Road) -> list[tuple[str, bytes, bytes]]:
    """Return reason, key and value of every dead letter."""
    letters = []
    for partition in range(4):
        topic = road.settings.kafka_topic_prefix + "file-events-dlq"
        async with LogReader(road.settings, topic, partition) as reader:
            async for records in reader.read(0):
                letters += [(dict(r.headers)["dl-reason"].decode(), r.key, r.value) for r in records]
    return letters


async def test_a_node_ends_in_time_though_its_broker_is_gone(make_settings: MakeSettings, tmp_path: Path) -> None:
    """SIGTERM ends every role within the bound, with exit code 0, also while Kafka does not answer any more."""
    with run_services(broker="kafka", database=False, data=None, say=print) as services:
        settings = make_settings(kafka_bootstrap_servers=services.kafka_bootstrap_servers, kafka_topic_partitions=4)
        await create_topics(settings)
        road = Road(settings, tmp_path)
        nodes = [road.start(role) for role in ROLES]
        try:
            await road.send(make_events(5_000, 500, seed=8))
            await road.until(partial(nodes[2].has_logged, '"batch_committed"'))
            os.kill(services.pids["broker"], signal.SIGKILL)
            for node in nodes:
                node.process.send_signal(signal.SIGTERM)

            assert [node.process.wait(STOP_SECONDS + 10) for node in nodes] == [0, 0, 0]
        finally:
            for node in nodes:
                node.kill()
