"""`stampline verify`: prove that nothing was lost and nothing was taken twice."""

from __future__ import annotations

import asyncio
from dataclasses import asdict

import click

from pipeline.cli.output import print_json, print_table
from pipeline.events import OUTCOMES
from pipeline.settings import load_settings
from pipeline.verify import all_faults, verify


@click.command("verify")
@click.option("--json", "as_json", is_flag=True, help="One JSON object with every partition.")
def command(*, as_json: bool) -> int:
    """Compare the log, the table and PostgreSQL; exit code 3 if they do not agree. Works on a running system."""
    found = asyncio.run(verify(load_settings()))
    reports, faults = found.partitions, all_faults(found)
    if as_json:
        print_json({"verify": "; ".join(faults) or "ok", "partitions": [asdict(report) for report in reports]})
    else:
        # A column for each outcome that any partition has, so that all rows have the same.
        shown = [name for name in OUTCOMES if any(report.outcomes[name] for report in reports)]
        print_table(
            [
                {
                    "partition": report.partition,
                    "inputs": report.inputs,
                    "pending": report.pending,
                    **{name: report.outcomes[name] for name in shown},
                    "files": report.files,
                    "verify": "; ".join(report.faults) or "ok",
                }
                for report in reports
            ]
        )
        for fault in found.faults:
            click.echo(fault)
    return 3 if faults else 0
