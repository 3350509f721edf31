"""The faults that chaos draws from. Each returns when its cause is gone; what it did must not show in the result."""

from __future__ import annotations

import asyncio
import resource
import signal
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Final, NamedTuple

from tests.chaos.stage import SESSION_SECONDS, Stage

#: How long connections are refused or swallowed, in s: longer than a session.
_OUTAGE_SECONDS: Final = SESSION_SECONDS * 1.7
_NODES_PER_ROLE_MAX: Final = 3
#: A disk that is full takes no more than this in one file, in bytes.
_FILE_BYTES_MAX: Final = 4096


class Fault(NamedTuple):
    """One kind of fault, and how often it is drawn in each round."""

    name: str
    inject: Callable[[Stage], Awaitable[None]]
    share: int = 1


async def kill_and_start(stage: Stage) -> None:
    """Kill -9; the next process of the slot comes at once."""
    place = stage.pick()
    await stage.kill(place)
    stage.start(*place)


async def kill(stage: Stage) -> None:
    """Kill -9; the other nodes of the role have to take over. The slot is filled again with the next fault."""
    await stage.kill(stage.pick())


async def freeze(stage: Stage) -> None:
    """Pause a node until the group has given its partitions to others, then let it go on: a zombie."""
    process = stage.nodes[stage.pick()].process
    process.send_signal(signal.SIGSTOP)
    await asyncio.sleep(_OUTAGE_SECONDS)
    process.send_signal(signal.SIGCONT)


async def terminate(stage: Stage) -> None:
    """SIGTERM; the next process of the slot comes after it."""
    place = stage.pick()
    await stage.terminate(place)
    stage.start(*place)


async def scale(stage: Stage) -> None:
    """One more node of a role, or one less where there are enough."""
    role, _ = stage.pick()
    slots = {slot for name, slot in stage.nodes.keys() - stage.missing if name == role}
    if len(slots) < _NODES_PER_ROLE_MAX:
        stage.start(role, next(slot for slot in range(_NODES_PER_ROLE_MAX) if slot not in slots))
    else:
        place = (role, max(slots))
        await stage.terminate(place)
        del stage.nodes[place]
        stage.missing.discard(place)


async def two_at_once(stage: Stage) -> None:
    """A node is killed while another one is frozen."""
    frozen = asyncio.create_task(freeze(stage))
    await kill_and_start(stage)
    await frozen


async def restart_broker(stage: Stage) -> None:
    """The broker is stopped and started."""
    await stage.restart_broker(kill=False)


async def kill_broker(stage: Stage) -> None:
    """The broker is killed and started."""
    await stage.restart_broker(kill=True)


async def restart_postgres(stage: Stage) -> None:
    """PostgreSQL ends its sessions and starts again."""
    await stage.restart_postgres(signal.SIGINT)


async def crash_postgres(stage: Stage) -> None:
    """PostgreSQL ends at once, without a checkpoint, and recovers."""
    await stage.restart_postgres(signal.SIGQUIT)


async def postgres_away(stage: Stage) -> None:
    """PostgreSQL is away for a while."""
    await stage.restart_postgres(signal.SIGINT, away_seconds=stage.away_seconds)


async def cut_kafka(stage: Stage) -> None:
    """Every connection of the nodes to the broker is reset."""
    stage.kafka_proxy.cut()


async def refuse_kafka(stage: Stage) -> None:
    """Nobody gets through to the broker for longer than a session."""
    await stage.kafka_proxy.refuse()
    await asyncio.sleep(_OUTAGE_SECONDS)
    await stage.kafka_proxy.heal()


async def swallow_kafka(stage: Stage) -> None:
    """What is sent to the broker, and what it answers, disappears for longer than a session."""
    stage.kafka_proxy.swallow()
    await asyncio.sleep(_OUTAGE_SECONDS)
    stage.kafka_proxy.cut()
    await stage.kafka_proxy.heal()


async def cut_postgres(stage: Stage) -> None:
    """Every connection of the nodes to PostgreSQL is reset."""
    stage.postgres_proxy.cut()


async def refuse_postgres(stage: Stage) -> None:
    """Nobody gets through to PostgreSQL."""
    await stage.postgres_proxy.refuse()
    await asyncio.sleep(_OUTAGE_SECONDS)
    await stage.postgres_proxy.heal()


async def swallow_postgres(stage: Stage) -> None:
    """What is sent to PostgreSQL, and what it answers, is held up, and then comes after all."""
    stage.postgres_proxy.swallow()
    await asyncio.sleep(_OUTAGE_SECONDS)
    await stage.postgres_proxy.heal()


async def rival_projector(stage: Stage) -> None:
    """A projector of another group works on all partitions beside their owners."""
    rival = stage.road.launch("tests.chaos.rival_projector")
    await asyncio.sleep(_OUTAGE_SECONDS)
    await asyncio.to_thread(rival.kill)


async def fill_disk(stage: Stage) -> None:
    """The disk below a table (and the node's log) is full for a while: no file may grow."""
    place = next((place for place in stage.nodes if place == ("reducer", 1)), None)
    if place is None or place in stage.missing:
        return
    pid = stage.nodes[place].process.pid
    with suppress(ProcessLookupError):
        _, hard = resource.prlimit(pid, resource.RLIMIT_FSIZE)
        resource.prlimit(pid, resource.RLIMIT_FSIZE, (_FILE_BYTES_MAX, hard))
        await asyncio.sleep(_OUTAGE_SECONDS)
        resource.prlimit(pid, resource.RLIMIT_FSIZE, (hard, hard))


FAULTS: Final = (
    Fault("kill -9, started again", kill_and_start, 5),
    Fault("kill -9, others take over", kill, 3),
    Fault("zombie (SIGSTOP, SIGCONT)", freeze, 3),
    Fault("SIGTERM, started again", terminate, 3),
    Fault("one node more or less", scale, 2),
    Fault("kill -9 beside a zombie", two_at_once, 2),
    Fault("broker restarted", restart_broker),
    Fault("broker kill -9", kill_broker),
    Fault("PostgreSQL restarted (fast)", restart_postgres),
    Fault("PostgreSQL restarted (immediate)", crash_postgres),
    Fault("PostgreSQL away", postgres_away),
    Fault("Kafka connections cut", cut_kafka),
    Fault("Kafka refuses", refuse_kafka),
    Fault("Kafka black hole", swallow_kafka),
    Fault("PostgreSQL connections cut", cut_postgres),
    Fault("PostgreSQL refuses", refuse_postgres),
    Fault("PostgreSQL black hole", swallow_postgres),
    Fault("two projectors on all partitions", rival_projector),
    Fault("disk of a table full", fill_disk),
)
