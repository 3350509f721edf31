"""Finding dead letters: by where their original stands, or by what they have in common.

PostgreSQL tells (`projections/dead_letters.py`). It lags behind the topic: who acts on letters looks for newer marks
there (`pipeline/replays.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final, Literal, NamedTuple

from pipeline.errors import StamplineError
from pipeline.postgres import PostgresConnectionManager
from pipeline.records import LetterId, Record, parse_letter_id
from pipeline.settings import Settings
from pipeline.topics import topic_name
from projections.dead_letters import restore_headers
from projections.queries import query

Status = Literal["open", "replayed", "dropped"]

#: Most letters that are found at once: a topic of dead letters may hold more than fit into memory.
FOUND_MAX: Final = 100_000


@dataclass(frozen=True, slots=True)
class Filters:
    """What letters have in common; None = whatever it is. They died from `since` on, and before `until`."""

    reason: str | None = None
    topic: str | None = None
    since: datetime | None = None
    until: datetime | None = None
    status: Status | None = None


class FoundLetter(NamedTuple):
    """A letter without its content."""

    id: LetterId
    reason: str
    error: str
    key: str | None
    dead_at: datetime
    status: Status
    attempts: int
    payload_bytes: int
    #: Where the letter itself stands, `NO_LETTER` where only its mark is known.
    letter_offset: int


class FullLetter(NamedTuple):
    """A letter with its content, as the original had it."""

    found: FoundLetter
    original: Record


def parse_letter(text: str) -> LetterId:
    """Return the letter that `TOPIC:PARTITION:OFFSET` means.

    Raises:
        ValueError: it means none; the message says why.
    """
    letter = parse_letter_id(text)
    if letter is None:
        raise ValueError(f"{text!r} is no TOPIC:PARTITION:OFFSET")
    return letter


class LetterShelf:
    """The letters as PostgreSQL shows them; topics may be named with the deployment's prefix or without it.

    Args:
        settings: the prefix of the topics.
        manager: the connections; the caller opens and closes them.
    """

    def __init__(self, settings: Settings, manager: PostgresConnectionManager) -> None:
        self._settings = settings
        self._manager = manager

    async def find(self, filters: Filters, limit: int, *, newest: bool) -> list[FoundLetter]:
        """Return letters that have all this in common.

        Args:
            filters: what they have in common.
            limit: most letters to return, at most `FOUND_MAX`.
            newest: the newest first; else topic by topic and partition by partition, in the order of the originals.

        Raises:
            ServiceUnavailable, SettingsError: as `PostgresConnectionManager.connection`.
        """
        arguments = (
            filters.reason,
            None if filters.topic is None else self._spellings(filters.topic),
            filters.since,
            filters.until,
            filters.status,
            min(limit, FOUND_MAX),
        )
        async with self._manager.connection() as connection:
            rows = await connection.fetch(
                query("newest_dead_letters" if newest else "dead_letters_in_order"), *arguments
            )
        return [_found(row) for row in rows]

    async def get(self, letters: Sequence[LetterId]) -> list[FoundLetter]:
        """Return these letters, in the order given.

        Raises:
            StamplineError: there is no such letter; names it.
            ServiceUnavailable, SettingsError: as `PostgresConnectionManager.connection`.
        """
        spellings = [LetterId(topic, *place) for topic, *place in letters]
        spellings += [LetterId(topic_name(self._settings, topic), *place) for topic, *place in letters]
        async with self._manager.connection() as connection:
            rows = await connection.fetch(query("dead_letters_by_id"), *_columns(spellings))
        known = {letter.id: letter for letter in map(_found, rows)}
        found = []
        for exact, prefixed in zip(letters, spellings[len(letters) :], strict=True):
            letter = known.get(exact) or known.get(prefixed)
            if letter is None:
                raise StamplineError(f"there is no dead letter {exact}: see `stampline dlq list --status all`")
            found.append(letter)
        return list(dict.fromkeys(found))

    async def read(self, letters: Sequence[LetterId]) -> list[FullLetter]:
        """Return these letters with their content, in the order given; one that has gone meanwhile is left out.

        Raises:
            ServiceUnavailable, SettingsError: as `PostgresConnectionManager.connection`.
        """
        async with self._manager.connection() as connection:
            rows = await connection.fetch(query("read_dead_letters"), *_columns(letters))
        full = {
            (found := _found(row)).id: FullLetter(
                found, Record(row["key_bytes"], row["payload"], restore_headers(row["headers"]))
            )
            for row in rows
        }
        return [full[letter] for letter in letters if letter in full]

    async def watermarks(self) -> dict[int, int]:
        """Return up to which offset each partition of the topic is projected; none = from its beginning."""
        async with self._manager.connection() as connection:
            rows = await connection.fetch(query("dead_letter_watermarks"))
        return {row["partition"]: row["feed_offset"] for row in rows}

    def _spellings(self, topic: str) -> list[str]:
        return [topic, topic_name(self._settings, topic)]


def _columns(letters: Sequence[LetterId]) -> tuple[list[str], list[int], list[int]]:
    return [item.topic for item in letters], [item.partition for item in letters], [item.offset for item in letters]


def _found(row: Any) -> FoundLetter:
    return FoundLetter(
        LetterId(row["topic"], row["partition"], row["offset"]),
        row["reason"],
        row["error"],
        row["key"],
        row["dead_at"],
        row["status"],
        row["attempts"],
        row["payload_bytes"] or 0,
        row["letter_offset"],
    )
