"""Nodes are killed, frozen, stopped and started while events flow; the result is that of a run without the faults.

CHAOS_SEED and CHAOS_FAULTS choose the run: the same seed draws the same faults.
"""

from __future__ import annotations

import asyncio
import os
import random
import signal
import time
from collections import Counter
from pathlib import Path
from typing import Final

import pytest

from pipeline.topics import create_topics
from pipeline.verify import verify
from tests.fix_road import NodeProcess, Road, ending, make_events
from tests.fix_services import MakeSettings

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(900)]

SEED: Final = int(os.environ.get("CHAOS_SEED", "1"))
FAULTS: Final = int(os.environ.get("CHAOS_FAULTS", "20"))
SESSION_MS: Final = 3000
EVENTS_PER_FAULT: Final = 3000


async def freeze(node: NodeProcess) -> None:
    """Pause a node until the group has given its partitions to others, then let it go on: a zombie."""
    node.process.send_signal(signal.SIGSTOP)
    await asyncio.sleep(SESSION_MS / 1000 * 1.7)
    node.process.send_signal(signal.SIGCONT)


async def test_faults_of_nodes_change_nothing(make_settings: MakeSettings, tmp_path: Path) -> None:
    """After kills, freezes beyond the session, and restarts of two nodes of each role, every event counts once."""
    chance = random.Random(SEED)
    settings = make_settings(kafka_topic_partitions=4, kafka_session_timeout_ms=SESSION_MS, allowed_roots=(tmp_path,))
    await create_topics(settings)
    with ending(Road(settings, tmp_path)) as road:
        alive = {(role, number): road.start(role) for role in ("hasher", "reducer", "projector") for number in (1, 2)}
        events, positions, faults, recoveries = [], [], Counter[str](), []
        for number in range(FAULTS):
            burst = make_events(EVENTS_PER_FAULT, 1000, seed=SEED * 10_000 + number)
            events += burst
            positions += await road.send(burst)
            role, _ = victim = chance.choice(list(alive))
            fault = chance.choice(["kill", "kill", "terminate", "freeze"])
            faults[f"{fault} {role}"] += 1
            if fault == "freeze":
                await freeze(alive[victim])
            else:
                alive[victim].kill() if fault == "kill" else alive[victim].terminate()
                alive[victim] = road.start(role)
            if number % 5 == 4:
                started = time.monotonic()
                await road.until_visible(positions)
                recoveries.append(time.monotonic() - started)
        await road.until_visible(positions)
        reports = await verify(settings)

        print(f"seed {SEED}: {len(events)} events, faults {dict(faults)}")
        print(f"caught up {sorted(round(seconds, 1) for seconds in recoveries)} s after every fifth fault")
        print(f"repeats {sum(r.repeats for r in reports)}, strays {sum(r.strays for r in reports)}")
        await road.assert_exact(events, positions)
        assert [fault for report in reports for fault in report.faults] == []
