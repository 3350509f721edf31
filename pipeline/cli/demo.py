"""`stampline demo`: everything on this machine, with the files of a folder as input, and what came of them."""

from __future__ import annotations

import asyncio
import sysconfig
import time
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from pipeline.cli.output import print_json, print_table, talk
from pipeline.cli.scan import scan_paths
from pipeline.cli.up import folder_argument, show_where_to_look, stack_options
from pipeline.errors import StamplineError
from pipeline.postgres import PostgresConnectionManager
from pipeline.stack import Stack, run_stack
from pipeline.verify import all_faults, verify
from pipeline.worker import stop_signal, until
from projections.queries import query

#: The demo gives up when nothing new has become visible for so long, in s.
_STALL_SECONDS: Final = 120.0
_POLL_SECONDS: Final = 0.05
_GROUPS_SHOWN: Final = 10


@click.command("demo")
@folder_argument
@click.option("--once", is_flag=True, help="Exit when the result is printed, instead of staying up.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as one JSON object.")
@click.option("--no-progress", is_flag=True, help="No progress bar.")
@stack_options
def command(path: Path | None, *, once: bool, as_json: bool, no_progress: bool, broker: Any, data: Path | None) -> int:
    """Start everything, scan PATH (default: Python's standard library), and show what came of it.

    Waits until every event is visible in PostgreSQL, and verifies the result; exit code 3 if it does not hold.
    """
    root = path or Path(sysconfig.get_paths()["stdlib"])
    return asyncio.run(_demo(root, once=once, as_json=as_json, progress=not no_progress, broker=broker, data=data))


async def _demo(root: Path, *, once: bool, as_json: bool, progress: bool, broker: Any, data: Path | None) -> int:
    stop = stop_signal()
    async with run_stack(broker=broker, data=data, path=root, quiet=True, say=talk) as stack:
        show = asyncio.create_task(_show(stack, root, as_json=as_json, progress=progress))
        if await until(stop, stack.watch(), _finished(show)):
            return 130
        code = show.result()
        if not once:
            show_where_to_look(stack)
            await until(stop, stack.watch())
        return code


async def _finished(task: asyncio.Task[int]) -> None:
    await task


async def _show(stack: Stack, root: Path, *, as_json: bool, progress: bool) -> int:
    talk(f"scanning {root}")
    started_at, started = datetime.now(UTC), time.perf_counter()
    scanned = await scan_paths(stack.settings, (root,), namespace="default", progress=progress)
    async with PostgresConnectionManager(stack.settings) as manager:
        await _wait_until_visible(manager, scanned.last_offsets, progress=progress)
        seconds = time.perf_counter() - started
        async with manager.connection() as connection:
            summary = await connection.fetchrow(query("summary"), started_at)
            groups = await connection.fetch(query("duplicate_groups"))
    assert summary is not None
    fault = "; ".join(all_faults(await verify(stack.settings)))
    p50, p99 = summary["freshness_ms"] or (0.0, 0.0)
    result = {
        "files": summary["files"],
        "bytes": summary["bytes"],
        "events": summary["events"],
        "duplicates": sum(group["copies"] - 1 for group in groups),
        "rejected": summary["rejected"],
        "events_per_second": round(summary["events"] / seconds),
        "freshness_ms_p50": round(p50),
        "freshness_ms_p99": round(p99),
        "verify": fault or "ok",
    }
    if as_json:
        print_json(result)
    else:
        print_table([result])
        _print_groups(groups)
    return 3 if fault else 0


def _print_groups(groups: list[Any]) -> None:
    if groups:
        click.echo()
        print_table(
            [
                {
                    "digest": group["digest"][:16] + "…",
                    "size": group["size"],
                    "copies": group["copies"],
                    "wasted bytes": group["wasted_bytes"],
                    "for example": group["uri"],
                }
                for group in groups[:_GROUPS_SHOWN]
            ],
            title=f"the {min(_GROUPS_SHOWN, len(groups))} biggest of {len(groups)} groups of equal files",
        )


async def _wait_until_visible(manager: PostgresConnectionManager, wanted: Mapping[int, int], *, progress: bool) -> None:
    """Return once the watermark of each partition has reached the offset wanted.

    Raises:
        StamplineError: nothing moved for a long time.
    """
    console = Console(stderr=True)
    with Progress(
        TextColumn("becoming visible"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=console,
        disable=not (progress and console.is_terminal),
        transient=True,
    ) as bar:
        task = bar.add_task("", total=sum(wanted.values()))
        moved_at, visible = time.monotonic(), -1
        while True:
            async with manager.connection() as connection:
                rows = await connection.fetch(query("input_watermarks"))
            marks = {row["partition"]: row["input_offset"] for row in rows}
            reached = sum(min(marks.get(partition, 0), offset) for partition, offset in wanted.items())
            bar.update(task, completed=reached)
            if reached == sum(wanted.values()):
                return
            if reached > visible:
                moved_at, visible = time.monotonic(), reached
            elif time.monotonic() - moved_at > _STALL_SECONDS:
                raise StamplineError(
                    f"only {reached} of {sum(wanted.values())} events became visible, and none for "
                    f"{_STALL_SECONDS:g} s: see the log above, or `stampline status`"
                )
            await asyncio.sleep(_POLL_SECONDS)
