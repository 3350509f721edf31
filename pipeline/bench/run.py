"""A whole bench: the services, the runs in turn, and the report."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import statistics
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import psutil
from msgspec import Struct

from pipeline.bench.load import CONTENT_BYTES, Load
from pipeline.bench.meter import Measured, measure
from pipeline.bench.systems import LIMIT, Chain, Limit, Site, System, connect
from pipeline.embedded import run_services
from pipeline.errors import StamplineError
from pipeline.servers.brokers import Kafka
from pipeline.settings import load_settings

#: With more load than this by others, no number of a run is worth anything.
FOREIGN_LOAD_PERCENT_MAX: Final = 10.0

Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Plan:
    """What to measure: the load, how often, and whether each hop of the chain alone too."""

    load: Load
    runs: int = 1
    hops: bool = False


class Run(Struct, frozen=True):
    """One measurement of one system or hop; that it is here says that it was complete and exact."""

    system: str
    number: int
    measured: Measured


class Summary(Struct, frozen=True):
    """All runs of a system in one line: events/s, and the median CPU time of an event by process, in µs."""

    system: str
    median: float
    least: float
    most: float
    cpu_us_per_event: dict[str, float | None]


class Report(Struct, frozen=True):
    """Everything that a bench found out."""

    machine: dict[str, str | int]
    versions: dict[str, str]
    events: int
    uris: int
    partitions: int
    content_bytes: int
    runs: list[Run]
    hops: list[Run]
    chain: Summary
    limit: Summary
    #: Median rate of the chain by that of the limit.
    chain_to_limit: float
    #: The worst of all runs; None = not measured.
    foreign_load_percent: float | None


async def run_bench(plan: Plan, say: Say) -> Report:
    """Measure the chain and the limit in turn.

    Raises:
        StamplineError: a system stood still, ended or was not exact: there is no report of such a run.
        ServiceUnavailable: a service does not start or does not answer.
    """
    if not LIMIT.is_file():
        raise StamplineError(f"`stampline bench` needs a checkout of the repository: there is no {LIMIT}")
    with keep_logs() as logs, find_site(say) as site:
        runs = []
        for number in range(1, plan.runs + 1):
            # Every other run goes the other way round: the services are warmer for the second.
            order: Sequence[type[System]] = (Chain, Limit) if number % 2 else (Limit, Chain)
            for system in order:
                say(f"run {number} of {plan.runs}: {system.name}, {plan.load.events} events")
                runs.append(Run(system.name, number, await _whole(system(site, plan.load), site, plan.load, logs)))
        hops = await _hops(site, plan.load, logs, say) if plan.hops else []
        versions = await find_versions(site, say)
    chain, limit = (summarize([run for run in runs if run.system == name]) for name in (Chain.name, Limit.name))
    foreign = [run.measured.foreign_load_percent for run in (*runs, *hops)]
    return Report(
        machine=machine(),
        versions=versions,
        events=plan.load.events,
        uris=plan.load.uris,
        partitions=site.settings.kafka_topic_partitions,
        content_bytes=CONTENT_BYTES,
        runs=runs,
        hops=hops,
        chain=chain,
        limit=limit,
        chain_to_limit=round(chain.median / limit.median, 3),
        foreign_load_percent=max((load for load in foreign if load is not None), default=None),
    )


def summarize(runs: Sequence[Run]) -> Summary:
    """Return the runs of one system as a median and its spread."""
    rates = [run.measured.events_per_second for run in runs]
    cpu: dict[str, float | None] = {}
    for name in runs[0].measured.cpu_us_per_event:
        known = [us for run in runs if (us := run.measured.cpu_us_per_event[name]) is not None]
        cpu[name] = round(statistics.median(known), 2) if known else None
    return Summary(runs[0].system, round(statistics.median(rates), 1), min(rates), max(rates), cpu)


async def _whole(system: System, site: Site, load: Load, logs: Path) -> Measured:
    """Measure all processes of a system together."""
    async with system:
        measured = await measure(system.stages(), events=load.events, services=site.pids, logs=logs)
        await system.check()
    return measured


async def _hops(site: Site, load: Load, logs: Path, say: Say) -> list[Run]:
    """Measure each process of the chain alone, one after the other on the same topics."""
    runs = []
    async with Chain(site, load) as chain:
        for stage in chain.stages():
            say(f"{stage.name} alone")
            runs.append(Run(stage.name, 1, await measure([stage], events=load.events, services=site.pids, logs=logs)))
        await chain.check()
    return runs


@contextmanager
def keep_logs() -> Iterator[Path]:
    """A folder for what the processes say, kept only where something goes wrong."""
    folder = Path(tempfile.mkdtemp(prefix="stampline-bench-"))
    failed = False
    try:
        yield folder
    except Exception:
        failed = True
        raise
    finally:
        if not failed:
            shutil.rmtree(folder)


@contextmanager
def find_site(say: Say) -> Iterator[Site]:
    """Use the services that the settings name; start those that they do not name."""
    settings = load_settings()
    named = settings.model_fields_set
    kafka = "kafka_bootstrap_servers" in named
    postgres = any(name.startswith("postgres_") for name in named)
    if kafka and postgres:
        yield Site(settings, {"kafka": None, "postgres": None})
        return
    with run_services(broker=None if kafka else "kafka", database=not postgres, data=None, say=say) as services:
        addresses = {
            "kafka_bootstrap_servers": services.kafka_bootstrap_servers,
            "postgres_dsn": services.postgres_dsn,
        }
        ours = load_settings(**{name: address for name, address in addresses.items() if address is not None})
        pids = services.pids
        yield Site(ours, {"kafka": pids.get("broker"), "postgres": pids.get("database")})


async def find_versions(site: Site, say: Say) -> dict[str, str]:
    """Return the versions of everything that was measured."""
    connection = await connect(site.settings)
    try:
        postgres = await connection.fetchval("SHOW server_version")
    finally:
        await connection.close()
    external = site.pids["kafka"] is None
    return {
        "stampline": importlib.metadata.version("stampline"),
        "python": platform.python_version(),
        "kafka": "not known" if external else Kafka(Path(), say=say).title.removeprefix("Apache Kafka "),
        "postgres": str(postgres),
    }


def machine() -> dict[str, str | int]:
    """Return what a measurement was made on."""
    return {"cores": os.cpu_count() or 1, "cpu": _cpu_model(), "memory_bytes": psutil.virtual_memory().total}


def _cpu_model() -> str:
    """Return the name of the processor as Linux tells it; elsewhere what Python knows."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())
