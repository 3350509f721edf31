"""`stampline projections`: rebuild a projection while it is being read and written, put it in place, and back."""

from __future__ import annotations

import asyncio
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from datetime import UTC, datetime
from typing import Any, Final

import click
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from pipeline.cli.output import print_json, print_table, talk
from pipeline.errors import StamplineError
from pipeline.postgres import PostgresConnectionManager
from pipeline.settings import load_settings
from projections import comparison, copies, dead_letters, retention, swap
from projections.comparison import Comparison
from projections.queries import query
from projections.rebuild import Tally
from projections.storage import OLD, SHADOW

#: How often progress is told where there is no terminal, in s.
_TELL_SECONDS: Final = 5.0
#: How much the programs that serve come first: what a person waits for can wait.
_NICE: Final = 10

_Report = Callable[[Tally], None]

name_argument = click.argument("name", type=click.Choice([*copies.REBUILDABLE, dead_letters.NAME]))
json_option = click.option("--json", "as_json", is_flag=True, help="Print the result as one JSON object.")
progress_option = click.option("--no-progress", is_flag=True, help="Tell nothing while it goes on.")
yes_option = click.option("--yes", is_flag=True, help="Do not ask.")


@click.group("projections")
def command() -> None:
    """Rebuild projections from the feed while they are being read and written.

    `rebuild` fills a shadow beside the live table and compares them; `swap` puts the shadow in place in one short
    transaction; `rollback` goes back to what was live before, until `drop-old` drops that.
    """


@command.command("list")
@json_option
def show(*, as_json: bool) -> None:
    """Show each projection, its rebuild and its old table. Rows are estimates of PostgreSQL."""

    async def read() -> list[copies.Overview]:
        async with PostgresConnectionManager(load_settings()) as manager, manager.connection() as connection:
            return await copies.overview(connection, await connection.fetch(query("projection_lag")))

    found = asyncio.run(read())
    if as_json:
        print_json([asdict(item) for item in found])
        return
    print_table(
        [
            {
                "projection": item.projection,
                "rows": item.rows,
                "next inputs": _range(item.input_offset_min, item.input_offset_max),
                "status": item.status,
                "lag ms": item.lag_ms,
                "rebuild": None
                if item.shadow_percent is None
                else f"{item.shadow_percent:g} %, {item.shadow_rows} rows",
                "old": None if item.old_since is None else f"{item.old_rows} rows, live until {item.old_since:%F %T}Z",
            }
            for item in found
        ]
    )


@command.command("rebuild")
@name_argument
@json_option
@progress_option
def rebuild(name: str, *, as_json: bool, no_progress: bool) -> int:
    """Fill a shadow of NAME from the feed, or go on with it, and compare it with the live table.

    Nothing that is live is changed. It may be ended at any moment, also with kill -9; called again it goes on. Exit
    code 3 if the shadow differs from what is live: `swap` then asks.
    """
    _require_rebuildable(name)
    _yield_to_others()
    settings = load_settings()

    async def run(report: _Report) -> Comparison:
        async with PostgresConnectionManager(settings) as manager:
            return await comparison.rebuild(settings, manager, name, report)

    with _progress(f"rebuilding {name}", shown=not no_progress) as report:
        started = time.monotonic()
        result = asyncio.run(run(report))
        seconds = time.monotonic() - started
    if as_json:
        print_json(_as_dict(result) | {"seconds": round(seconds, 3)})
    else:
        _show(result)
    talk(
        f"{name} is rebuilt and equal to what is live: run `stampline projections swap {name}`"
        if result.equal
        else f"{name} is rebuilt and differs from what is live; `stampline projections swap {name}` asks before it "
        "puts the rebuilt rows in place"
    )
    return 0 if result.equal else 3


@command.command("swap")
@name_argument
@click.option("--accept-differences", is_flag=True, help="Swap though the rebuilt rows differ from the live ones.")
@click.option("--drop-old", is_flag=True, help="Drop the old table of the swap before.")
@json_option
@progress_option
def swap_in(name: str, *, accept_differences: bool, drop_old: bool, as_json: bool, no_progress: bool) -> int:
    """Put the rebuilt table of NAME in place; what was live becomes the old table. Exit code 3 if they differ.

    Readers and projectors go on. Views, those of users too, then show the new rows.
    """
    _require_rebuildable(name)
    settings = load_settings()

    def accept(found: Comparison) -> bool:
        if accept_differences:
            return True
        _show(found, err=True)
        if sys.stdin.isatty():
            return click.confirm("The rebuilt rows differ from the live ones. Put them in place?", err=True)
        talk("stampline: the rebuilt rows differ from the live ones: swap with --accept-differences")
        return False

    async def run(report: _Report) -> swap.Swapped:
        async with PostgresConnectionManager(settings) as manager:
            return await swap.swap(settings, manager, name, accept=accept, drop_old=drop_old, report=report)

    with _progress(f"swapping {name}", shown=not no_progress) as report:
        result = asyncio.run(run(report))
    _tell_swapped(result, as_json=as_json)
    return 3 if result.held_ms is None else 0


@command.command("rollback")
@name_argument
@json_option
@progress_option
def roll_back(name: str, *, as_json: bool, no_progress: bool) -> None:
    """Put the old table of NAME back, brought up to date; what is live becomes the old table."""
    _require_rebuildable(name)
    settings = load_settings()

    async def run(report: _Report) -> swap.Swapped:
        async with PostgresConnectionManager(settings) as manager:
            return await swap.roll_back(settings, manager, name, report=report)

    with _progress(f"rolling {name} back", shown=not no_progress) as report:
        result = asyncio.run(run(report))
    _tell_swapped(result, as_json=as_json)


@command.command("cancel")
@name_argument
@yes_option
def cancel(name: str, *, yes: bool) -> None:
    """Drop the rebuild of NAME. What is live stays as it is."""
    _drop(name, SHADOW, f"Drop the rebuild of {name}?", yes=yes)


@command.command("drop-old")
@name_argument
@yes_option
def drop_old_table(name: str, *, yes: bool) -> None:
    """Drop the old table of NAME. There is no way back to it then."""
    _drop(name, OLD, f"Drop the old table of {name}?", yes=yes)


@command.command("drop-history")
@click.option("--before", type=click.DateTime(["%Y-%m-%d", "%Y-%m"]), required=True, help="A day or month, in UTC.")
@click.option("--dry-run", is_flag=True, help="Only tell what would be dropped.")
@yes_option
@json_option
def drop_old_history(*, before: datetime, dry_run: bool, yes: bool, as_json: bool) -> None:
    """Drop the months of file_history that ended before a day. There is no way back.

    `verify`, `wait_for` and a rebuild know what was dropped; contents and activity keep what they have counted.
    """
    settings, moment = load_settings(), before.replace(tzinfo=UTC)

    async def run(*, only_tell: bool) -> list[str]:
        async with PostgresConnectionManager(settings) as manager:
            return await retention.drop_history(manager, moment, dry_run=only_tell)

    names = asyncio.run(run(only_tell=True))
    if names and not dry_run:
        if not yes:
            click.confirm(f"Drop {', '.join(names)}?", abort=True, err=True)
        names = asyncio.run(run(only_tell=False))
    if as_json:
        print_json({"dropped": not dry_run, "tables": names})
    else:
        print_table([{"table": name} for name in names])
    if not names:
        talk(f"no month of the history ended before {moment:%Y-%m-%d}")


def _drop(name: str, schema: str, question: str, *, yes: bool) -> None:
    _require_rebuildable(name)
    settings = load_settings()

    async def run() -> None:
        async with PostgresConnectionManager(settings) as manager:
            await swap.drop_copy(
                manager, name, schema, confirm=lambda: yes or click.confirm(question, abort=True, err=True)
            )

    asyncio.run(run())
    talk(f"{schema}.{name} is dropped")


def _require_rebuildable(name: str) -> None:
    if name == dead_letters.NAME:
        raise StamplineError(
            f"{name} is small and not rebuilt beside the live one: stop the projectors, empty stampline.dead_letters "
            "and its rows in stampline.watermarks, and start them again; its topic is read anew"
        )


def _yield_to_others() -> None:
    with suppress(OSError):
        os.nice(_NICE)


@contextmanager
def _progress(what: str, *, shown: bool) -> Iterator[_Report]:
    """Show how far it is: a bar on a terminal, else a line now and then."""
    console = Console(stderr=True)
    if not shown:
        yield lambda _tally: None
    elif not console.is_terminal:
        yield _Lines(what)
    else:
        with Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TaskProgressColumn(),
            TextColumn("{task.completed} of {task.total} records"),
            TextColumn("{task.fields[rate]:,}/s"),
            TimeRemainingColumn(),
            console=console,
            transient=True,
        ) as bar:
            task = bar.add_task(what, total=None, rate=0)
            started = time.monotonic()

            def show_bar(tally: Tally) -> None:
                rate = round(tally.read / max(time.monotonic() - started, 1e-3))
                bar.update(task, completed=tally.read, total=tally.total, rate=rate)

            yield show_bar


class _Lines:
    """Tells a tally every few seconds, in one line."""

    def __init__(self, what: str) -> None:
        self._what = what
        self._started = self._told = time.monotonic()

    def __call__(self, tally: Tally) -> None:
        now = time.monotonic()
        if now - self._told < _TELL_SECONDS:
            return
        self._told = now
        rate = tally.read / (now - self._started)
        left = round((tally.total - tally.read) / rate) if rate else 0
        talk(f"{self._what}: {tally.read} of {tally.total} records, {rate:,.0f}/s, {left} s left")


def _tell_swapped(result: swap.Swapped, *, as_json: bool) -> None:
    if as_json:
        found = result.comparison
        print_json(
            {
                "projection": result.projection,
                "swapped": result.held_ms is not None,
                "held_ms": result.held_ms,
                "comparison": None if found is None else _as_dict(found),
            }
        )
    elif result.held_ms is not None:
        talk(
            f"{result.projection} is exchanged; projectors had to wait {result.held_ms:g} ms. The table that was live "
            f"is kept until `stampline projections drop-old {result.projection}`"
        )


def _as_dict(found: Comparison) -> dict[str, Any]:
    return {
        "projection": found.projection,
        "equal": found.equal,
        "records_read": found.tally.read,
        "inputs_copied": found.tally.copied,
        "records_refused": found.tally.refused,
        "partitions": [asdict(item) for item in found.partitions],
    }


def _show(found: Comparison, *, err: bool = False) -> None:
    """Print a comparison for people."""
    tally = found.tally
    if tally.copied:
        talk(f"{tally.copied} rows were copied from the live tables because compaction had taken them from the feed")
    if tally.refused:
        talk(f"{tally.refused} records were left out because PostgreSQL refuses them")
    if err:
        for item in found.partitions:
            if not item.equal:
                talk(f"{_place(item)}: {item.live_rows} rows live, {item.rows} rebuilt, not the same")
        return
    print_table(
        [
            {
                "partition": "all" if item.partition is None else item.partition,
                "rows live": item.live_rows,
                "rows rebuilt": item.rows,
                "compared": "equal" if item.equal else "different",
            }
            for item in found.partitions
        ]
    )


def _place(item: comparison.PartitionSum) -> str:
    return "all partitions" if item.partition is None else f"partition {item.partition}"


def _range(least: int | None, most: int | None) -> str | None:
    return None if least is None else f"{least} to {most}"
