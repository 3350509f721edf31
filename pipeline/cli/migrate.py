"""`stampline migrate`: bring the schema of PostgreSQL to a version."""

from __future__ import annotations

import click

from migrations import run
from pipeline.cli.output import talk
from pipeline.postgres import tls_context
from pipeline.settings import Settings, load_settings


@click.group("migrate")
def command() -> None:
    """Bring the schema of PostgreSQL to a version."""


@command.command("upgrade")
@click.argument("revision", default="head")
def upgrade(revision: str) -> None:
    """Go up to REVISION (default: the newest)."""
    settings = load_settings()
    run.upgrade(settings.postgres_url, revision, tls=tls_context(settings))
    talk(f"the schema is at {_current(settings)}")


@command.command("downgrade")
@click.argument("revision")
@click.option("--yes", is_flag=True, help="Do not ask.")
def downgrade(revision: str, *, yes: bool) -> None:
    """Go down to REVISION (`base` = before the first one). Drops what that revision does not know."""
    settings = load_settings()
    if not yes:
        click.confirm(f"Drop tables and their rows at {settings.postgres_place}?", abort=True, err=True)
    run.downgrade(settings.postgres_url, revision, tls=tls_context(settings))
    talk(f"the schema is at {_current(settings)}")


@command.command("current")
def current() -> None:
    """Print the revision that the database is at."""
    click.echo(_current(load_settings()))


@command.command("revision")
@click.option("-m", "--message", required=True, help="What the migration does, in a few words.")
def revision(message: str) -> None:
    """Write a new migration from the difference between migrations/schema.py and the database."""
    settings = load_settings()
    click.echo(run.revision(message, settings.postgres_url, tls=tls_context(settings)))


def _current(settings: Settings) -> str:
    return run.current(settings.postgres_url, tls=tls_context(settings)) or "base"
