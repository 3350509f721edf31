"""`stampline bench`: throughput of the chain beside the limit of this machine; recovery; how long one waits."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any, Final

import click
import msgspec

from pipeline.cli.output import print_json, print_table, talk
from pipeline.errors import StamplineError

if TYPE_CHECKING:
    from pipeline.bench.recovery import RecoveryReport
    from pipeline.bench.run import Report
    from pipeline.bench.waits import WaitReport

_NOT_MEASURED: Final = "not measured"


_KEYS_MIN: Final = 1000


class _Numbers(click.ParamType):
    """Numbers with commas between."""

    name = "N,N,…"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, ...]:
        """Return the numbers, or say which is none."""
        if isinstance(value, tuple):
            return value
        numbers = []
        for part in str(value).split(","):
            if not part.isdecimal() or int(part) < _KEYS_MIN:
                self.fail(f"{part!r} is no number from {_KEYS_MIN} on", param, ctx)
            numbers.append(int(part))
        return tuple(numbers)


@click.command("bench")
@click.option("--events", type=click.IntRange(1000), default=300_000, show_default=True, help="Events in each run.")
@click.option("--uris", type=click.IntRange(1), default=20_000, show_default=True, help="Files they are about.")
@click.option("--runs", type=click.IntRange(1, 100), default=1, show_default=True, help="Times both are measured.")
@click.option("--hops", is_flag=True, help="Measure each role alone too.")
@click.option("--recovery", is_flag=True, help="Measure instead how long a table takes to come back.")
@click.option(
    "--keys", type=_Numbers(), default="1000000", show_default=True, help="Sizes of the tables for --recovery."
)
@click.option("--wait", is_flag=True, help="Measure instead how long one waits until one's own write is visible.")
@click.option(
    "--rate", type=click.IntRange(1, 10_000), default=500, show_default=True, help="Events a second for --wait."
)
@click.option("--seconds", type=click.IntRange(1, 3600), default=10, show_default=True, help="How long, for --wait.")
@click.option("--json", "as_json", is_flag=True, help="Print everything as one JSON object.")
def command(
    events: int,
    uris: int,
    runs: int,
    *,
    hops: bool,
    recovery: bool,
    keys: tuple[int, ...],
    wait: bool,
    rate: int,
    seconds: int,
    as_json: bool,
) -> None:
    """Measure the events a second of this machine, and those of a hand-written limit beside it.

    Starts Apache Kafka and PostgreSQL unless KAFKA_BOOTSTRAP_SERVERS and POSTGRES_* name some. A run is an error, with
    exit code 1, unless every event is there exactly once. Needs a checkout with its development tools.
    """
    try:
        # The meter and the limit need development tools that an installed stampline does not have.
        from pipeline.bench.load import Load  # noqa: PLC0415
        from pipeline.bench.recovery import RecoveryPlan, run_recovery  # noqa: PLC0415
        from pipeline.bench.run import Plan, run_bench  # noqa: PLC0415
        from pipeline.bench.waits import WaitPlan, run_waits  # noqa: PLC0415
    except ModuleNotFoundError as exc:
        raise StamplineError(
            f"`stampline bench` needs a checkout with its development tools, and there is no {exc.name}: "
            "run `make bench` in a clone of the repository"
        ) from exc
    if wait:
        waited = asyncio.run(run_waits(WaitPlan(rate, seconds), talk))
        if as_json:
            print_json(msgspec.to_builtins(waited))
        else:
            show_waits(waited)
        return
    if recovery:
        recovered = asyncio.run(run_recovery(RecoveryPlan(keys, runs), talk))
        if as_json:
            print_json(msgspec.to_builtins(recovered))
        else:
            show_recovery(recovered)
        return
    report = asyncio.run(run_bench(Plan(Load(events, min(uris, events)), runs, hops), talk))
    if as_json:
        print_json(msgspec.to_builtins(report))
    else:
        show(report)


def show(report: Report) -> None:
    """Print a report for people."""
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
    _tell_foreign_load(report.foreign_load_percent)


def show_recovery(report: RecoveryReport) -> None:
    """Print a report on recovery for people."""
    machine, versions = report.machine, report.versions
    talk(f"{machine['cores']} cores of {machine['cpu']}, {int(machine['memory_bytes']) / 2**30:.0f} GiB")
    talk(", ".join(f"{name} {version}" for name, version in versions.items()))
    talk(f"keys of {report.key_bytes} bytes, values of {report.value_bytes:g}, {report.partitions} partitions at once")
    print_table(
        [
            {
                "keys": recovery.keys,
                "store": recovery.store,
                "restored": recovery.what,
                "records": recovery.records,
                "s": round(recovery.seconds, 2),
                "rec./s": round(recovery.keys_per_second),
                "RAM B/key": recovery.memory_bytes_per_key,
                "disk B/key": "" if recovery.disk_bytes_per_key is None else recovery.disk_bytes_per_key,
                "others %": _shown(recovery.foreign_load_percent),
            }
            for recovery in report.recoveries
        ],
        title="Recovery",
    )


def show_waits(report: WaitReport) -> None:
    """Print a report on waits for people."""
    machine, versions = report.machine, report.versions
    talk(f"{machine['cores']} cores of {machine['cpu']}, {int(machine['memory_bytes']) / 2**30:.0f} GiB")
    talk(", ".join(f"{name} {version}" for name, version in versions.items()))
    talk(
        f"{report.events} events of {report.content_bytes} bytes, {report.events_per_second} a second, "
        f"{report.partitions} partitions; every one was reached"
    )
    print_table(
        [
            {"from the call until": "Kafka has it", "p50 ms": report.sent_ms_p50, "p99 ms": report.sent_ms_p99},
            {"from the call until": "reached", "p50 ms": report.reached_ms_p50, "p99 ms": report.reached_ms_p99},
        ],
        title="Reading one's own write",
    )
    _tell_foreign_load(report.foreign_load_percent)


def _tell_foreign_load(percent: float | None) -> None:
    from pipeline.bench.run import FOREIGN_LOAD_PERCENT_MAX  # noqa: PLC0415 - as above

    talk(f"foreign_load_percent: {_NOT_MEASURED if percent is None else percent}")
    if percent is not None and percent > FOREIGN_LOAD_PERCENT_MAX:
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
