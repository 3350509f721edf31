"""What a command prints: JSON for machines, a table for people."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import click
import orjson
from rich.console import Console
from rich.table import Table


def print_json(value: Any) -> None:
    """Print one JSON document on a line."""
    click.echo(orjson.dumps(value, default=str).decode())


def print_table(rows: Sequence[Mapping[str, Any]], *, title: str | None = None) -> None:
    """Print rows of equal keys as a table."""
    table = Table(title=title, title_justify="left", box=None, pad_edge=False)
    for name in rows[0] if rows else ():
        table.add_column(name, justify="right" if isinstance(rows[0][name], int | float) else "left", overflow="fold")
    for row in rows:
        table.add_row(*("-" if value is None else str(value) for value in row.values()))
    Console().print(table)


def talk(line: str) -> None:
    """Tell a person what is going on, on standard error."""
    click.echo(line, err=True)
