"""A node that counts itself: `python -m tests.chaos.soaking_node ROLE`, for the soak.

It is `stampline worker ROLE` with one thread more, which prints a line of JSON every second: how many unfinished tasks
all event loops of the process have, and how many blocks of memory Python has allocated. Nothing in the production code
knows of it.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
import threading
import time
from typing import Any, Final

from pipeline.cli.main import main

#: What the lines are told apart by.
EVENT: Final = "soak"
_COUNT_SECONDS: Final = 1.0

_loops: Final[list[asyncio.BaseEventLoop]] = []


def remember_loops() -> None:
    """Remember every event loop that is made from here on: Faust's consumers have one in a thread of their own."""
    begin = asyncio.BaseEventLoop.__init__

    def begin_and_remember(loop: asyncio.BaseEventLoop, *arguments: Any, **options: Any) -> None:
        begin(loop, *arguments, **options)
        _loops.append(loop)

    asyncio.BaseEventLoop.__init__ = begin_and_remember  # type: ignore[assignment, method-assign]


def count() -> dict[str, int]:
    """Count the tasks of the open loops, and what Python has allocated."""
    _loops[:] = [loop for loop in _loops if not loop.is_closed()]
    return {"tasks": sum(len(asyncio.all_tasks(loop)) for loop in _loops), "blocks": sys.getallocatedblocks()}


def count_for_ever() -> None:
    """Print the counts again and again, each line at once and whole."""
    while True:
        os.write(1, json.dumps({"event": EVENT, "at": time.time(), **count()}).encode() + b"\n")
        time.sleep(_COUNT_SECONDS)


if __name__ == "__main__":
    remember_loops()
    threading.Thread(target=count_for_ever, daemon=True).start()
    sys.exit(main(["worker", *sys.argv[1:]]))
