"""`stampline wait`: wait until an event is visible in PostgreSQL."""

from __future__ import annotations

import asyncio
import re
from dataclasses import asdict
from typing import Any, Final

import click

from pipeline.cli.output import print_json, talk
from pipeline.client import Position
from pipeline.errors import InvalidToken
from pipeline.settings import Settings, load_settings
from pipeline.waiting import Answer, Verdict, Waiter

_EXIT_CODES: Final[dict[Verdict, int]] = {"reached": 0, "rejected": 1, "timeout": 1, "stalled": 3}
_UNITS: Final = {"ms": 0.001, "": 1.0, "s": 1.0, "m": 60.0, "h": 3600.0}


class _Duration(click.ParamType):
    """A number with a unit; seconds without one."""

    name = "DURATION"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """Return it in s, or say what is wrong with it."""
        found = re.fullmatch(r"([0-9]{1,6}(?:\.[0-9]{1,3})?)(ms|s|m|h|)", str(value))
        seconds = float(found[1]) * _UNITS[found[2]] if found else 0.0
        if seconds <= 0:
            self.fail(f"{value!r} is no duration: 500ms, 10s, 5m or 1h", param, ctx)
        return seconds


class _Token(click.ParamType):
    """A token, checked before anything else happens."""

    name = "TOKEN"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """Return it, or say what a token is."""
        try:
            return Position.parse(value).token
        except InvalidToken as exc:
            self.fail(str(exc), param, ctx)


@click.command("wait")
@click.argument("token", type=_Token())
@click.option("--timeout", type=_Duration(), default="10s", show_default=True, help="Longest wait.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object.")
def command(token: str, timeout: float, *, as_json: bool) -> int:
    """Wait until the event of TOKEN is visible in PostgreSQL, or it is known that it will not be.

    Exit code 0 for reached, 1 for rejected and for timeout, 3 for stalled. A token is what a producer gets for its
    event: file-events:PARTITION:OFFSET.
    """
    answer = asyncio.run(_wait(load_settings(), token, timeout))
    if as_json:
        print_json({"token": token, **asdict(answer)})
    else:
        click.echo(answer.verdict if answer.reason is None else f"{answer.verdict}: {answer.reason}")
    if answer.verdict == "stalled":
        talk(
            f"stampline: nobody has projected partition {answer.partition} since {answer.since}: "
            "look at `stampline status`, and start a projector (`stampline worker projector`) if there is none"
        )
    elif answer.verdict == "timeout":
        talk(
            f"stampline: not visible after {timeout:g} s: look at `stampline lag` and `stampline status`, "
            "or wait longer with --timeout"
        )
    return _EXIT_CODES[answer.verdict]


async def _wait(settings: Settings, token: str, timeout_seconds: float) -> Answer:
    async with Waiter(settings) as waiter:
        return await waiter.wait(token, timeout_seconds)
