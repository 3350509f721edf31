"""`stampline worker`: run roles in this process."""

from __future__ import annotations

import asyncio

import click

from pipeline.settings import load_settings
from pipeline.worker import ROLES, run_until_signalled


@click.command("worker")
@click.argument("roles", nargs=-1, required=True, type=click.Choice(ROLES))
def command(roles: tuple[str, ...]) -> None:
    """Run ROLES until SIGTERM or Ctrl-C; what is in flight is finished first.

    More processes of a role share its partitions.
    """
    asyncio.run(run_until_signalled(load_settings(), list(dict.fromkeys(roles))))
