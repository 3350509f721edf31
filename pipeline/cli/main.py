"""The command `stampline`: its groups, its exit codes, and how errors are told.

Standard output is data, standard error is talk. Exit codes: 0 ok, 1 failed, 2 usage, 3 unhealthy or drift found,
130 interrupted. Each command imports what it needs when it runs, so that `--help` is quick.
"""

from __future__ import annotations

import importlib
import sys
from typing import Any, Final

import click

from pipeline import logs
from pipeline.errors import StamplineError

#: Every command and the module it lives in.
_COMMANDS: Final = {
    "bench": "pipeline.cli.bench",
    "demo": "pipeline.cli.demo",
    "dlq": "pipeline.cli.dlq",
    "lag": "pipeline.cli.lag",
    "migrate": "pipeline.cli.migrate",
    "projections": "pipeline.cli.projections",
    "scan": "pipeline.cli.scan",
    "status": "pipeline.cli.status",
    "topics": "pipeline.cli.topics",
    "up": "pipeline.cli.up",
    "verify": "pipeline.cli.verify",
    "wait": "pipeline.cli.wait",
    "worker": "pipeline.cli.worker",
}


class _LazyGroup(click.Group):
    def list_commands(self, _ctx: click.Context) -> list[str]:
        return sorted(_COMMANDS)

    def get_command(self, _ctx: click.Context, name: str) -> click.Command | None:
        module = _COMMANDS.get(name)
        if module is None:
            return None
        command: click.Command = importlib.import_module(module).command
        return command


@click.group(cls=_LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="stampline", prog_name="stampline")
def cli() -> None:
    """File events on Kafka become exact, fresh, queryable facts in PostgreSQL.

    Every setting is an environment variable; deployment/env.example lists them all.
    """


def main(args: list[str] | None = None) -> int:
    """Run the command line and return the exit code."""
    logs.keep_silent()  # until a command sets up logging
    try:
        result: Any = cli.main(args=args, prog_name="stampline", standalone_mode=False)
    except click.ClickException as exc:
        exc.show()
        return exc.exit_code
    except (click.Abort, KeyboardInterrupt):
        return 130
    except StamplineError as exc:
        for line in str(exc).splitlines():
            click.echo(f"stampline: {line}", err=True)
        return 1
    return result if isinstance(result, int) else 0


if __name__ == "__main__":
    sys.exit(main())
