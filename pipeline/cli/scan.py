"""`stampline scan`: send an event for every file below some folders."""

from __future__ import annotations

import asyncio
from pathlib import Path

import click
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from pipeline import scan as scanning
from pipeline.cli.output import print_json, talk
from pipeline.client import EventProducer
from pipeline.settings import Settings, load_settings


@click.command("scan")
@click.argument("paths", nargs=-1, required=True, type=click.Path(exists=True, path_type=Path))
@click.option("--namespace", default="default", show_default=True, help="Namespace of the files.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as one JSON object.")
@click.option("--no-progress", is_flag=True, help="No progress bar.")
def command(paths: tuple[Path, ...], namespace: str, *, as_json: bool, no_progress: bool) -> None:
    """Walk PATHS and send one event for every file. The hasher must be allowed to read them: see ALLOWED_ROOTS."""
    settings = load_settings()
    result = asyncio.run(scan_paths(settings, paths, namespace=namespace, progress=not no_progress))
    if as_json:
        print_json(result_as_dict(result))
    else:
        talk(f"{result.files} files, {result.bytes} bytes sent; {result.skipped_total} left out")


async def scan_paths(
    settings: Settings, paths: tuple[Path, ...], *, namespace: str, progress: bool
) -> scanning.ScanResult:
    """Scan with a progress bar on a terminal."""
    console = Console(stderr=True)
    with Progress(
        SpinnerColumn(),
        TextColumn("{task.description}"),
        TextColumn("{task.completed} files, {task.fields[bytes]:,} bytes"),
        TimeElapsedColumn(),
        console=console,
        disable=not (progress and console.is_terminal),
        transient=True,
    ) as bar:
        task = bar.add_task("scanning", total=None, bytes=0)

        def show(result: scanning.ScanResult) -> None:
            bar.update(task, completed=result.files, bytes=result.bytes)

        async with EventProducer(settings) as producer:
            return await scanning.scan(paths, producer, namespace=namespace, on_progress=show)


def result_as_dict(result: scanning.ScanResult) -> dict[str, object]:
    """Return the result as JSON types."""
    return {
        "files": result.files,
        "bytes": result.bytes,
        "skipped": dict(result.skipped),
        "next_offsets": {str(partition): offset for partition, offset in sorted(result.last_offsets.items())},
    }
