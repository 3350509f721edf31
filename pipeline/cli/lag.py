"""`stampline lag`: how far the projections are behind."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Sequence
from contextlib import nullcontext, suppress
from typing import Any, Final

import click
from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from pipeline.cli.output import print_json
from pipeline.postgres import PostgresConnectionManager
from pipeline.settings import Settings, load_settings
from projections.queries import query

_STYLES: Final = {"live": "green", "catching_up": "yellow", "stalled": "red", "rebuilding": "cyan"}
_COLUMNS: Final = ("projection", "partition", "rows_behind", "lag_ms", "heartbeat_age_ms", "status")


@click.command("lag")
@click.option("--watch", is_flag=True, help="Look again and again, until Ctrl-C or SIGTERM.")
@click.option(
    "--interval-ms",
    type=click.IntRange(100, 3_600_000),
    default=1000,
    show_default=True,
    help="Pause between two looks of --watch.",
)
@click.option("--json", "as_json", is_flag=True, help="One JSON document for each look.")
def command(*, watch: bool, interval_ms: int, as_json: bool) -> int:
    """Show how far each projection of each partition is behind: rows, and the age of the oldest that is not visible.

    Exit code 3, without --watch, if something is stalled: its projector has stopped, or cannot do its work.
    """
    settings = load_settings().model_copy(update={"database_pool_min_size": 1})
    if watch:
        asyncio.run(_watch(settings, interval_ms / 1000, as_json=as_json))
        return 0
    rows = asyncio.run(_look_once(settings))
    _show(Console(), rows, as_json=as_json)
    return 3 if any(row["status"] == "stalled" for row in rows) else 0


async def _look_once(settings: Settings) -> list[dict[str, Any]]:
    async with PostgresConnectionManager(settings) as manager:
        return await _look(manager)


async def _watch(settings: Settings, pause_seconds: float, *, as_json: bool) -> None:
    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    console = Console()
    drawn = console.is_terminal and not as_json
    async with PostgresConnectionManager(settings) as manager:
        with Live(console=console, auto_refresh=False) if drawn else nullcontext() as live:
            while not stop.is_set():
                rows = await _look(manager)
                if live is not None:
                    live.update(_table(rows), refresh=True)
                else:
                    _show(console, rows, as_json=as_json)
                with suppress(TimeoutError):
                    async with asyncio.timeout(pause_seconds):
                        await stop.wait()


async def _look(manager: PostgresConnectionManager) -> list[dict[str, Any]]:
    async with manager.connection() as connection:
        return [dict(row) for row in await connection.fetch(query("projection_lag"))]


def _show(console: Console, rows: Sequence[dict[str, Any]], *, as_json: bool) -> None:
    if as_json:
        print_json(rows)
    else:
        console.print(_table(rows))


def _table(rows: Sequence[dict[str, Any]]) -> Table:
    table = Table(box=None, pad_edge=False)
    for name in _COLUMNS:
        table.add_column(name, justify="left" if name in {"projection", "status"} else "right")
    for row in rows:
        *numbers, status = (str(row[name]) for name in _COLUMNS)
        table.add_row(*numbers, Text(status, style=_STYLES.get(status, "")))
    return table
