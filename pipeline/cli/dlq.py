"""`stampline dlq`: look at dead letters, send their originals in again, or drop them."""

from __future__ import annotations

import asyncio
import re
from base64 import b64encode
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any, Final, TypeVar, cast

import click
from rich.markup import escape

from pipeline.cli.output import print_json, print_table, talk
from pipeline.errors import StamplineError
from pipeline.letters import FOUND_MAX, Filters, FoundLetter, FullLetter, LetterShelf, Status, parse_letter
from pipeline.postgres import PostgresConnectionManager
from pipeline.records import REPLAY_HEADER, LetterId
from pipeline.replays import Acted, Action, LetterDesk, Refusal
from pipeline.settings import Settings, load_settings
from projections.dead_letters import describe_headers

#: As much of a payload is shown to a person; `--json` has all of it.
_SHOWN_BYTES_MAX: Final = 64 * 1024
_DUMP_WIDTH: Final = 16
_AGE: Final = re.compile(r"(\d{1,6})([smhd])")
_UNITS: Final = {"s": "seconds", "m": "minutes", "h": "hours", "d": "days"}

_Command = TypeVar("_Command", bound=Callable[..., Any])


class _Moment(click.ParamType):
    """A time in ISO 8601, or an age."""

    name = "TIME"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> datetime:
        age = _AGE.fullmatch(value)
        try:
            if age is not None:
                return datetime.now(UTC) - timedelta(**{_UNITS[age[2]]: int(age[1])})
            moment = datetime.fromisoformat(value)
            return moment.replace(tzinfo=moment.tzinfo or UTC).astimezone(UTC)
        except (ValueError, OverflowError):
            self.fail(f"{value!r} is neither a time such as 2026-11-23T09:00:00Z nor an age such as 90m", param, ctx)


class _Letter(click.ParamType):
    """Where the original of a letter stands."""

    name = "LETTER"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> LetterId:
        try:
            return parse_letter(value)
        except ValueError as exc:
            self.fail(str(exc), param, ctx)


@dataclass(frozen=True, slots=True)
class _Choice:
    """What the options of `replay` and `drop` say."""

    letters: tuple[LetterId, ...]
    filters: Filters
    limit: int
    dry_run: bool
    yes: bool
    force: bool
    as_json: bool


def _filtering(function: _Command) -> _Command:
    """Add the options that choose letters by what they have in common."""
    for option in reversed(
        (
            click.option("--reason", help="Why they died, for example `undecodable`."),
            click.option("--topic", help="The topic of the original."),
            click.option(
                "--since", type=_Moment(), help="Died at this time or later: ISO 8601 (UTC), or 90m, 12h, 7d."
            ),
            click.option("--until", type=_Moment(), help="Died before this time."),
            click.option(
                "--status",
                type=click.Choice(["open", "replayed", "dropped", "all"]),
                help="What was done with them; the default is open.",
            ),
        )
    ):
        function = option(function)
    return function


@click.group("dlq")
def command() -> None:
    """Look at dead letters, send their originals in again, or drop them.

    A letter is named by where its original stands: TOPIC:PARTITION:OFFSET, for example file-events:3:4711.
    """


@command.command("list")
@_filtering
@click.option("--limit", type=click.IntRange(1, FOUND_MAX), default=50, show_default=True, help="Most letters to show.")
@click.option("--json", "as_json", is_flag=True, help="One JSON list.")
def list_letters(*, limit: int, as_json: bool, **filters: Any) -> None:
    """List dead letters, the newest first."""
    settings = load_settings()

    async def find() -> list[FoundLetter]:
        async with PostgresConnectionManager(settings) as manager:
            # One more than are shown, so as to know whether there are more.
            return await LetterShelf(settings, manager).find(_filters(**filters), limit + 1, newest=True)

    found = asyncio.run(find())
    if as_json:
        print_json([_describe(letter) for letter in found[:limit]])
    elif found:
        rows = [_describe(letter) for letter in found[:limit]]
        print_table([{name: _shown(value) for name, value in row.items()} for row in rows])
    else:
        talk("no dead letters")
    if len(found) > limit:
        talk(f"there are more than these {limit}: set --limit")


@command.command("show")
@click.argument("letter", type=_Letter())
@click.option("--json", "as_json", is_flag=True, help="One JSON object, with the bytes in base64.")
def show(letter: LetterId, *, as_json: bool) -> None:
    """Show LETTER: why it died, where it came from, its headers and its payload."""
    settings = load_settings()

    async def read() -> list[FullLetter]:
        async with PostgresConnectionManager(settings) as manager:
            shelf = LetterShelf(settings, manager)
            return await shelf.read([found.id for found in await shelf.get([letter])])

    [full] = asyncio.run(read())
    if as_json:
        print_json(_describe_fully(full))
    else:
        _print_letter(full)


def _acting(function: _Command) -> _Command:
    """Add the options of the commands that do something with letters."""
    for option in reversed(
        (
            click.argument("letters", nargs=-1, type=_Letter()),
            _filtering,
            click.option(
                "--all", "every", is_flag=True, help="Every letter that the filters leave, instead of LETTERS."
            ),
            click.option(
                "--limit", type=click.IntRange(1, FOUND_MAX), help="Most letters to take, in the order they came."
            ),
            click.option("--dry-run", is_flag=True, help="Only tell what would be done."),
            click.option("--yes", is_flag=True, help="Do not ask."),
            click.option("--force", is_flag=True, help="Also those that were replayed or dropped before."),
            click.option("--json", "as_json", is_flag=True, help="One JSON object."),
        )
    ):
        function = cast("Any", option)(function)
    return function


@command.command("replay")
@_acting
def replay(**options: Any) -> int:
    """Send the originals of LETTERS in again, to the topic and the partition they came from.

    Prints each letter and where its event stands now. An event that was refused for a reason that is still there
    becomes a new dead letter, which names this one in its header dl-replay-of.
    """
    return _run("replay", _choose(**options))


@command.command("drop")
@_acting
def drop(**options: Any) -> int:
    """Mark LETTERS as dropped: nothing is to be done about them. They can still be shown, and replayed by force."""
    return _run("drop", _choose(**options))


def _choose(
    *,
    letters: tuple[LetterId, ...],
    every: bool,
    limit: int | None,
    dry_run: bool,
    yes: bool,
    force: bool,
    as_json: bool,
    **filters: Any,
) -> _Choice:
    chosen_by = [name for name, value in (*filters.items(), ("limit", limit)) if value is not None]
    if letters and (every or chosen_by):
        raise click.UsageError("name letters, or choose them by --all and filters, not both")
    if not letters and not every:
        raise click.UsageError("name letters (TOPIC:PARTITION:OFFSET), or take --all that the filters leave")
    return _Choice(letters, _filters(**filters), limit or FOUND_MAX, dry_run, yes, force, as_json)


def _filters(*, status: str | None, **others: Any) -> Filters:
    return Filters(**others, status=None if status == "all" else cast("Status", status or "open"))


def _run(action: Action, choice: _Choice) -> int:
    settings = load_settings()
    return asyncio.run(_act(settings, action, choice))


async def _act(settings: Settings, action: Action, choice: _Choice) -> int:
    async with PostgresConnectionManager(settings) as manager:
        shelf = LetterShelf(settings, manager)
        desk = LetterDesk(settings, shelf, action, force=choice.force)
        found = await _find(shelf, choice)
        refused = await desk.judge(found)
        left_out = {refusal.letter for refusal in refused}
        wanted = [letter for letter in found if letter.id not in left_out]
        if refused and (choice.letters or not wanted):
            raise StamplineError(f"nothing was done: {_tell(refused)}")
        acted: list[Acted] = []
        if not choice.dry_run:
            _ask(action, wanted, refused, choice)
            async with aclosing(desk.act(wanted)) as doing:
                async for done in doing:
                    acted += done.acted
                    refused += done.refused
                    if not choice.as_json:
                        _print_acted(done.acted)
    _print_result(action, choice, wanted, acted, refused)
    return 0 if choice.dry_run or acted else 1


async def _find(shelf: LetterShelf, choice: _Choice) -> list[FoundLetter]:
    if choice.letters:
        return await shelf.get(choice.letters)
    found = await shelf.find(choice.filters, choice.limit, newest=False)
    if not found:
        # By force what is not open may be meant; but then it is to be said.
        raise StamplineError("there is no such dead letter: see `stampline dlq list --status all`")
    return found


def _ask(action: Action, wanted: Sequence[FoundLetter], refused: Sequence[Refusal], choice: _Choice) -> None:
    if choice.yes:
        return
    letters = f"{len(wanted)} dead letter{'s' if len(wanted) > 1 else ''}"
    if refused:
        talk(f"left out: {_tell(refused)}")
    question = f"Send {letters} in again?" if action == "replay" else f"Drop {letters}?"
    # Not click's, which writes to standard output too.
    click.echo(f"{question} [y/N]: ", nl=False, err=True)
    if click.get_text_stream("stdin").readline().strip().lower() not in {"y", "yes"}:
        raise click.Abort


def _print_acted(acted: Sequence[Acted]) -> None:
    for letter, token in acted:
        click.echo(f"{letter}\t{token}" if token is not None else str(letter))


def _print_result(
    action: Action, choice: _Choice, wanted: Sequence[FoundLetter], acted: Sequence[Acted], refused: Sequence[Refusal]
) -> None:
    if choice.as_json:
        print_json(
            {
                "action": action,
                "dry_run": choice.dry_run,
                "letters": [
                    {"letter": str(letter), "token": token}
                    for letter, token in (acted if not choice.dry_run else [(item.id, None) for item in wanted])
                ],
                "refused": [{"letter": str(letter), "why": why} for letter, why in refused],
            }
        )
        return
    if choice.dry_run:
        _print_acted([Acted(letter.id, None) for letter in wanted])
    verb = "sent in again" if action == "replay" else "dropped"
    talk(f"{len(wanted)} would be {verb}" if choice.dry_run else f"{len(acted)} {verb}")
    if refused:
        talk(f"left out: {_tell(refused)}")


def _tell(refused: Sequence[Refusal]) -> str:
    """Return one line that names the letters where they are few, else their number for each reason."""
    if len(refused) <= 3:  # noqa: PLR2004 - as many as a line holds
        return "; ".join(f"{letter}: {why}" for letter, why in refused)
    return "; ".join(f"{count} letters: {why}" for why, count in Counter(why for _, why in refused).items())


def _describe(letter: FoundLetter) -> dict[str, Any]:
    return {
        "letter": str(letter.id),
        "status": letter.status,
        "reason": letter.reason,
        "error": letter.error,
        "key": letter.key,
        "bytes": letter.payload_bytes,
        "attempts": letter.attempts,
        "dead_at": letter.dead_at.isoformat(timespec="milliseconds"),
    }


def _describe_fully(letter: FullLetter) -> dict[str, Any]:
    original = letter.original
    return {
        **_describe(letter.found),
        "topic": letter.found.id.topic,
        "partition": letter.found.id.partition,
        "offset": letter.found.id.offset,
        "replay_of": _replay_of(letter),
        "key_base64": None if original.key is None else b64encode(original.key).decode(),
        "payload_base64": None if original.value is None else b64encode(original.value).decode(),
        "headers": describe_headers(original.headers),
    }


def _replay_of(letter: FullLetter) -> str | None:
    values = [value for name, value in letter.original.headers if name == REPLAY_HEADER and value is not None]
    return values[-1].decode(errors="backslashreplace") if values else None


def _print_letter(letter: FullLetter) -> None:
    told = _describe(letter.found) | {"replay of": _replay_of(letter)}
    for name, value in told.items():
        click.echo(f"{name + ':':<10} {'-' if value is None else printable(str(value))}")
    for entry in describe_headers(letter.original.headers):
        shown = f"base64 {entry['base64']}" if "base64" in entry else str(entry["value"])
        click.echo(f"header:    {printable(str(entry['name']))} = {printable(shown)}")
    payload = letter.original.value
    if payload is None:
        click.echo("payload:   none")
        return
    click.echo("payload:")
    shown_bytes = payload[:_SHOWN_BYTES_MAX]
    try:
        click.echo(printable(payload.decode()[:_SHOWN_BYTES_MAX], keep="\n\t"))
    except UnicodeDecodeError:
        for start in range(0, len(shown_bytes), _DUMP_WIDTH):
            click.echo(_dump_line(start, shown_bytes[start : start + _DUMP_WIDTH]))
    if len(payload) > _SHOWN_BYTES_MAX:
        talk("the payload is longer: --json has all of it")


def _dump_line(start: int, piece: bytes) -> str:
    text = "".join(chr(byte) if 32 <= byte < 127 else "." for byte in piece)  # noqa: PLR2004 - what ASCII can print
    return f"{start:08x}  {piece.hex(' '):<{_DUMP_WIDTH * 3}} {text}"


def printable(text: str, *, keep: str = "") -> str:
    """Return text that does nothing to a terminal: what cannot be printed is escaped, but for what is to be kept."""
    return "".join(
        char if char.isprintable() or char in keep else char.encode("unicode_escape").decode() for char in text
    )


def _shown(value: Any) -> Any:
    return escape(printable(value)) if isinstance(value, str) else value
