"""How long the usual questions of analysts take where there are a million files."""

from __future__ import annotations

import statistics
import time
from typing import Final

import asyncpg
import pytest

from tests.integration.test_analyst_queries import QUERIES, fill

_RUNS: Final = 21


@pytest.mark.performance
@pytest.mark.timeout(600)
async def test_the_usual_questions_are_quick(database: str) -> None:
    """Prints how long each takes at 1,000,000 files: median and maximum, over a connection on this machine."""
    connection = await asyncpg.connect(database)
    try:
        await fill(connection, 1_000_000)
        print("\n| question | median ms | max ms |\n|---|---|---|")
        for name, query in QUERIES.items():
            times = []
            for _ in range(_RUNS):
                begun = time.perf_counter()
                assert await connection.fetch(query)
                times.append((time.perf_counter() - begun) * 1000)
            print(f"| {name} | {statistics.median(times):.2f} | {max(times):.2f} |")
    finally:
        await connection.close()
