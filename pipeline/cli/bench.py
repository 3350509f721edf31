"""`stampline bench`: throughput of the chain beside the limit of this machine."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import click
import msgspec

from pipeline.cli.output import print_json, print_table, talk
from pipeline.errors import StamplineError

if TYPE_CHECKING:
    from pipeline.bench.run import Report

_NOT_MEASURED = "not measured"


@click.command("bench")
@click.option("--events", type=click.IntRange(1000), default=300_000, show_default=True, help="Events in each run.")
@click.option("--uris", type=click.IntRange(1), default=20_000, show_default=True, help="Files they are about.")
@click.option("--runs", type=click.IntRange(1, 100), default=1, show_default=True, help="Times both are measured.")
@click.option("--hops", is_flag=True, help="Measure each role alone too.")
@click.option("--json", "as_json", is_flag=True, help="Print everything as one JSON object.")
def command(events: int, uris: int, runs: int, *, hops: bool, as_json: bool) -> None:
    """Measure the events a second of this machine, and those of a hand-written limit beside it.

    Starts Apache Kafka and PostgreSQL unless KAFKA_BOOTSTRAP_SERVERS and POSTGRES_* name some. A run is an error, with
    exit code 1, unless every event is there exactly once. Needs a checkout with its development tools.
    """
    try:
        # The meter and the limit need development tools that an installed stampline does not have.
        from pipeline.bench.load import Load  # noqa: PLC0415
        from pipeline.bench.run import Plan, run_bench  # noqa: PLC0415
    except ModuleNotFoundError as exc:
        raise StamplineError(
            f"`stampline bench` needs a checkout with its development tools, and there is no {exc.name}: "
            "run `make bench` in a clone of the repository"
        ) from exc
    report = asyncio.run(run_bench(Plan(Load(events, min(uris, events)), runs, hops), talk))
    if as_json:
        print_json(msgspec.to_builtins(report))
    else:
        show(report)


def show(report: Report) -> None:
    """Print a report for people."""
    from pipeline.bench.run import FOREIGN_LOAD_PERCENT_MAX  # noqa: PLC0415 - as above

    machine, versions = report.machine, report.versions
    talk(f"{machine['cores']} cores of {machine['cpu']}, {int(machine['memory_bytes']) / 2**30:.0f} GiB")
    talk(", ".join(f"{name} {version}" for name, version in versions.items()))
    talk(f"{report.events} events over {report.uris} files, {report.content_bytes} bytes each; every run was exact")
    if not all(run.measured.warm for run in report.runs):
        talk("too few events for a rate: the start of the processes counts too; ask for more with --events")
    summaries = (report.chain, report.limit)
    print_table(
        [
            {
                "system": summary.system,
                "events/s": round(summary.median),
                "least": round(summary.least),
                "most": round(summary.most),
                "CPU µs/event": _total(summary.cpu_us_per_event),
            }
            for summary in summaries
        ],
        title=f"Throughput, median of {sum(run.system == 'chain' for run in report.runs)}",
    )
    rows = [
        {"system": summary.system, "process": name, "CPU µs/event": _shown(us)}
        for summary in summaries
        for name, us in summary.cpu_us_per_event.items()
    ]
    print_table(rows, title="\nCPU by process")
    if report.hops:
        print_table([_hop_row(run.system, run.measured) for run in report.hops], title="\nEach role alone")
    talk(f"chain / limit: {report.chain_to_limit:.2f}")
    foreign = report.foreign_load_percent
    talk(f"foreign_load_percent: {_NOT_MEASURED if foreign is None else foreign}")
    if foreign is not None and foreign > FOREIGN_LOAD_PERCENT_MAX:
        talk(f"others used more than {FOREIGN_LOAD_PERCENT_MAX:g} % of this machine: do not believe these numbers")


def _hop_row(name: str, measured: Any) -> dict[str, Any]:
    cpu = measured.cpu_us_per_event
    return {"role": name, "events/s": round(measured.events_per_second)} | {
        f"{'itself' if process == name else process} µs": _shown(us) for process, us in cpu.items()
    }


def _total(cpu: dict[str, float | None]) -> float | str:
    values = list(cpu.values())
    return _NOT_MEASURED if None in values else round(sum(us for us in values if us is not None), 1)


def _shown(us: float | None) -> float | str:
    return _NOT_MEASURED if us is None else us
