"""`stampline up`: everything on this machine, in one command."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from pipeline.cli.output import talk
from pipeline.client import EventProducer
from pipeline.embedded import find_psql
from pipeline.follow import follow
from pipeline.stack import Stack, run_stack
from pipeline.worker import stop_signal, until

folder_argument = click.argument(
    "path", required=False, type=click.Path(exists=True, file_okay=False, resolve_path=True, path_type=Path)
)


def stack_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options that say what to run on."""
    command = click.option(
        "--data",
        type=click.Path(file_okay=False, path_type=Path),
        help="Folder that keeps broker and database; without it both are temporary.",
    )(command)
    return click.option(
        "--broker",
        type=click.Choice(["embedded", "kafka"]),
        default="embedded",
        show_default=True,
        help="Which broker to start where KAFKA_BOOTSTRAP_SERVERS is not set: the one in the wheel (in memory, no "
        "transactions), or Apache Kafka (needs Java and Maven).",
    )(command)


@click.command("up")
@folder_argument
@stack_options
def command(path: Path | None, broker: Any, data: Path | None) -> None:
    """Start broker and database, make topics and tables, run all roles, and follow PATH if it is given.

    Services that KAFKA_BOOTSTRAP_SERVERS or POSTGRES_* name are used instead of started. Ctrl-C ends it.
    """
    asyncio.run(_up(path, broker, data))


async def _up(path: Path | None, broker: Any, data: Path | None) -> None:
    stop = stop_signal()
    async with run_stack(broker=broker, data=data, path=path, quiet=False, say=talk) as stack:
        show_where_to_look(stack)
        if path is None:
            await until(stop, stack.watch())
            return
        async with EventProducer(stack.settings) as producer:
            talk(f"following {path}")
            await until(stop, stack.watch(), follow(path, producer))


def show_where_to_look(stack: Stack) -> None:
    """Tell how to reach what runs."""
    settings = stack.settings
    talk(f"broker:    {settings.kafka_bootstrap_servers}")
    if stack.own_database:
        talk(f"database:  {settings.postgres_url}")
        talk(f"look:      {find_psql() or 'psql'} '{settings.postgres_url}' -c 'TABLE files LIMIT 10'")
    else:
        talk(f"database:  {settings.postgres_place}")  # Without its password.
    for url in stack.node.web_urls:
        talk(f"web:       {url} (Faust's view on the tables of this process)")
    talk("stop:      Ctrl-C")
