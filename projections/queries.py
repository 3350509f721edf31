"""The SQL of the projections by name; the statements themselves are in `queries.sql`."""

from __future__ import annotations

import re
from functools import cache
from importlib.resources import files
from typing import Final

_NAME: Final = re.compile(r"^-- name: (\w+)$", re.MULTILINE)

#: The schema that the statements are written for, with the dot that makes it one.
_WRITTEN_FOR: Final = re.compile(r"\bstampline\.")


@cache
def query(name: str, schema: str = "stampline") -> str:
    """Return the statement called `name`, for the tables of `schema`.

    Only tables exist in more than one schema: a statement that calls a function of ours is for `stampline` alone.

    Raises:
        KeyError: there is none, which is a bug of ours.
    """
    return _WRITTEN_FOR.sub(f"{schema}.", read_script("queries.sql")[name])


@cache
def read_script(name: str) -> dict[str, str]:
    """Return the statements of a script in this package by their names, without comments."""
    script = files("projections").joinpath(name).read_text(encoding="utf-8")
    _, *parts = _NAME.split(script)
    names, bodies = parts[::2], parts[1::2]
    assert len(set(names)) == len(names)
    return {name: _without_comments(body) for name, body in zip(names, bodies, strict=True)}


def _without_comments(body: str) -> str:
    return "\n".join(line for line in body.splitlines() if line and not line.startswith("--"))
