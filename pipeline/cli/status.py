"""`stampline status`: are the services there, and how far has each partition come?"""

from __future__ import annotations

import asyncio
from dataclasses import asdict

import click

from pipeline.cli.output import print_json, print_table
from pipeline.settings import load_settings
from pipeline.status import read_status


@click.command("status")
@click.option("--json", "as_json", is_flag=True, help="One JSON object.")
def command(*, as_json: bool) -> int:
    """Show the services and how far each partition has come; exit code 3 if a service is away."""
    status = asyncio.run(read_status(load_settings()))
    if as_json:
        print_json(asdict(status))
    else:
        print_table([{"service": "kafka", "status": status.kafka}, {"service": "database", "status": status.database}])
        if status.partitions:
            click.echo()
            print_table([asdict(partition) for partition in status.partitions])
    return 0 if status.kafka == status.database == "ok" else 3
