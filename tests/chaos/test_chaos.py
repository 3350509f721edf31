"""Processes, servers, connections and disks fail while events flow; the result is that of a run without the faults.

CHAOS_SEED, CHAOS_FAULTS, CHAOS_RATE (events/s) and CHAOS_AWAY_SECONDS choose the long run (`make chaos`). The same
seed draws the same faults in the same order.
"""

from __future__ import annotations

import asyncio
import os
import random
import statistics
import time
from collections import Counter, defaultdict
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, Final

import pytest
from aiokafka import AIOKafkaConsumer, TopicPartition
from blake3 import blake3

from pipeline.events import decode_event
from pipeline.settings import Settings
from pipeline.verify import all_faults, verify
from tests.chaos.faults import FAULTS, Fault
from tests.chaos.stage import PARTITIONS, ROLES, Stage, run_stage

SEED: Final = int(os.environ.get("CHAOS_SEED", "1"))
FAULTS_WANTED: Final = int(os.environ.get("CHAOS_FAULTS", "200"))
EVENTS_PER_SECOND: Final = float(os.environ.get("CHAOS_RATE", "400"))
AWAY_SECONDS: Final = float(os.environ.get("CHAOS_AWAY_SECONDS", "60"))

#: So that a laptop sees many faults in little time; a standby that takes over is part of the play.
VARIABLES: Final = {"db_circuit_breaker_recovery_timeout": 2.0, "table_standby_replicas": 1}


def draw_faults(seed: int, count: int) -> list[Fault]:
    """Return that many faults: whole rounds, each with every kind as often as its share, in an order of its own."""
    chance = random.Random(seed)
    drawn: list[Fault] = []
    while len(drawn) < count:
        one_round = [fault for fault in FAULTS for _ in range(fault.share)]
        chance.shuffle(one_round)
        drawn += one_round
    return drawn[:count]


async def play(stage: Stage, faults: Sequence[Fault]) -> dict[str, list[float]]:
    """Inject the faults one after the other; return how long each took until new events were visible again, in s.

    The time counts from when the cause was gone (from the kill of a process, from the start of a server) until an event
    sent after that is visible on every partition.
    """
    times: dict[str, list[float]] = defaultdict(list)
    await stage.until_working()
    for number, fault in enumerate(faults):
        begun = time.monotonic()
        await fault.inject(stage)
        gone = time.monotonic()
        seconds = await stage.until_working()
        times[fault.name].append(seconds)
        print(f"{number + 1:4} {fault.name:34} fault {gone - begun:5.1f} s, recovery {seconds:5.1f} s", flush=True)
        for place in sorted(stage.missing):
            stage.start(*place)
    await stage.be_quiet()
    return times


async def take_over(stage: Stage, rounds: int) -> dict[str, list[float]]:
    """Take one of two nodes of each role away, by SIGKILL and by SIGTERM; return how long the other needed, in s."""
    times: dict[str, list[float]] = defaultdict(list)
    for _ in range(rounds):
        for role in ROLES:
            for name, end in (("kill -9", stage.kill), ("SIGTERM", stage.terminate)):
                place = stage.pick(role)
                await stage.until_working()
                begun = time.monotonic()
                ending = asyncio.create_task(end(place))
                await stage.until_working()
                times[f"{name} of one {role} of two"].append(time.monotonic() - begun)
                await ending
                stage.start(*place)
                node = stage.nodes[place]
                await stage.until(partial(node.has_logged, '"partitions_assigned"'))
    await stage.be_quiet()
    return times


async def read_inputs(stage: Stage) -> dict[int, list[tuple[int, str, str, str]]]:
    """Read `file-events` with a plain consumer: offset, event id, uri and digest of the content, by partition."""
    consumer = AIOKafkaConsumer(bootstrap_servers=stage.settings.kafka_bootstrap_servers, max_poll_records=5000)
    await consumer.start()
    inputs: dict[int, list[tuple[int, str, str, str]]] = {}
    try:
        for number in range(PARTITIONS):
            tp = TopicPartition("file-events", number)
            consumer.assign([tp])
            await consumer.seek_to_beginning(tp)
            [end] = (await consumer.end_offsets([tp])).values()
            found: list[Any] = []
            while await consumer.position(tp) < end:
                found += (await consumer.getmany(tp, timeout_ms=200)).get(tp, [])
            decoded = ((record.offset, decode_event(record.key, record.value)) for record in found)
            inputs[number] = [
                (offset, event.event_id, event.uri, blake3(event.content or b"").hexdigest())
                for offset, event in decoded
            ]
    finally:
        await consumer.stop()
    return inputs


async def assert_exact(stage: Stage) -> None:
    """Compare PostgreSQL with what is in the log, by nothing that stampline computes itself."""
    inputs = await read_inputs(stage)
    ids = {event_id for entries in inputs.values() for _, event_id, _, _ in entries}
    versions: Counter[str] = Counter()
    digests: dict[str, str] = {}
    seen: set[str] = set()
    for entries in inputs.values():
        for _, event_id, uri, digest in entries:
            if event_id not in seen:
                seen.add(event_id)
                versions[uri] += 1
                digests[uri] = digest
    files = {row["uri"]: (row["version"], row["digest"]) for row in await stage.fetch("SELECT * FROM files")}
    history = Counter(
        (row["input_partition"], row["input_offset"])
        for row in await stage.fetch("SELECT input_partition, input_offset FROM file_history")
    )

    assert ids == {event.event_id for event in stage.events}
    assert files == {uri: (versions[uri], digests[uri]) for uri in versions}
    assert history == Counter((number, entry[0]) for number, entries in inputs.items() for entry in entries)


def report(stage: Stage, times: dict[str, list[float]], seed: int) -> None:
    """Print what happened."""
    everything = [seconds for values in times.values() for seconds in values]
    print(f"\nseed {seed}: {len(everything)} faults, {len(stage.events)} events")
    session_seconds = stage.settings.kafka_session_timeout_ms / 1000
    print(f"the producer had to connect again {stage.interruptions} times; session timeout {session_seconds:g} s")
    print("time from the end of the fault until an event sent after it is visible on every partition:\n")
    print("| fault | times | median s | max s |\n|---|---|---|---|")
    for name, values in [*times.items(), ("all", everything)]:
        print(f"| {name} | {len(values)} | {statistics.median(values):.1f} | {max(values):.1f} |")
    print(*stage.deaths, sep="\n", flush=True)


async def prove(stage: Stage) -> None:
    """Let `verify` and the independent check look at everything."""
    assert all_faults(await verify(stage.settings)) == []
    await assert_exact(stage)
    assert stage.deaths == []


async def run(folder: Path, *, seed: int, faults: Sequence[Fault], events_per_second: float, away: float) -> None:
    """Play and prove."""
    async with run_stage(
        folder, seed=seed, events_per_second=events_per_second, away_seconds=away, variables=dict(VARIABLES)
    ) as stage:
        report(stage, await play(stage, faults), seed)
        await prove(stage)


@pytest.mark.integration
@pytest.mark.timeout(400)
async def test_each_kind_of_fault_once(tmp_path: Path) -> None:
    """After one fault of each kind nothing is lost and nothing doubled, and no node has ended by itself."""
    faults = list(FAULTS)
    random.Random(SEED).shuffle(faults)
    await run(tmp_path, seed=SEED, faults=faults, events_per_second=200, away=8)


@pytest.mark.chaos
@pytest.mark.timeout(3 * 3600)
async def test_many_faults(tmp_path: Path) -> None:
    """After hundreds of faults nothing is lost and nothing doubled, and no node has ended by itself."""
    faults = draw_faults(SEED, FAULTS_WANTED)
    await run(tmp_path, seed=SEED, faults=faults, events_per_second=EVENTS_PER_SECOND, away=AWAY_SECONDS)


@pytest.mark.chaos
@pytest.mark.timeout(1800)
async def test_take_over(tmp_path: Path) -> None:
    """With the default session, one of two nodes of each role takes over what the other one had."""
    async with run_stage(
        tmp_path,
        seed=SEED,
        events_per_second=200,
        away_seconds=0,
        variables={"kafka_session_timeout_ms": Settings().kafka_session_timeout_ms},
    ) as stage:
        report(stage, await take_over(stage, rounds=3), SEED)
        await prove(stage)
