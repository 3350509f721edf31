"""`stampline status`: are the services there, how far has each partition come, and what are the nodes doing?"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import click

from pipeline.cli.output import print_json, print_table
from pipeline.health import label_order
from pipeline.settings import load_settings
from pipeline.status import NodeStatus, read_status
from pipeline.worker import ROLES


@click.command("status")
@click.option("--json", "as_json", is_flag=True, help="One JSON object.")
def command(*, as_json: bool) -> int:
    """Show the services, how far each partition has come, and what the nodes are doing with it.

    Exit code 3 if a service is away or a node says that a partition of it has failed. A partition without a node, or
    one that is being recovered, is shown and is no failure.
    """
    status = asyncio.run(read_status(load_settings()))
    if as_json:
        print_json(asdict(status))
    else:
        print_table([{"service": "kafka", "status": status.kafka}, {"service": "database", "status": status.database}])
        if status.partitions:
            click.echo()
            print_table([asdict(partition) for partition in status.partitions])
        if status.nodes:
            click.echo()
            print_table(_rows(status.nodes))
    return 0 if status.healthy else 3


def _rows(nodes: Sequence[NodeStatus]) -> list[dict[str, Any]]:
    """Return a row for each partition of each role, in the order of the road."""
    rows = [
        {"role": role, "partition": partition, "is": said, "node": node.node, "web": node.web}
        for node in nodes
        for role, partitions in node.roles.items()
        for partition, said in partitions.items()
    ]
    return sorted(rows, key=lambda row: (ROLES.index(row["role"]), label_order(row["partition"])))
