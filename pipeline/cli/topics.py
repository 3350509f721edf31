"""`stampline topics`: make and check the topics."""

from __future__ import annotations

import asyncio
from dataclasses import asdict

import click

from pipeline.cli.output import print_json, print_table
from pipeline.settings import load_settings
from pipeline.topics import check_topics, create_topics


@click.group("topics")
def command() -> None:
    """Make and check the topics."""


@command.command("create")
def create() -> None:
    """Make every topic that is missing; what exists is left as it is."""
    for name in asyncio.run(create_topics(load_settings())):
        click.echo(name)


@command.command("check")
@click.option("--json", "as_json", is_flag=True, help="One JSON object per topic.")
def check(*, as_json: bool) -> int:
    """Compare the topics with what stampline needs; exit code 3 if one does not fit."""
    checks = asyncio.run(check_topics(load_settings()))
    if as_json:
        for item in checks:
            print_json(asdict(item))
    else:
        print_table([asdict(item) | {"fault": item.fault or "ok"} for item in checks])
    return 3 if any(item.fault for item in checks) else 0
