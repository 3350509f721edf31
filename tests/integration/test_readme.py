"""What the README shows is what happens: its code runs, its queries answer, its commands and files exist."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.cli.main import cli
from tests.fix_road import DEADLINE_SECONDS, Road, environment

pytestmark = pytest.mark.integration

_ROOT = Path(__file__).parents[2]
_README = (_ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    """Return the README's code in a language."""
    return re.findall(rf"```{language}\n(.*?)```", _README, flags=re.DOTALL)


async def test_the_producer_and_the_queries_of_the_readme_work(road: Road) -> None:
    """The Python code prints a token, and once its event is visible each query answers."""
    road.start("hasher", "reducer", "projector")
    (code,) = blocks("python")
    done = subprocess.run(  # noqa: ASYNC221 - nothing else runs on this loop meanwhile
        [sys.executable, "-c", code],
        cwd=_ROOT,
        env=environment(road.settings),
        capture_output=True,
        text=True,
        timeout=DEADLINE_SECONDS,
        check=True,
    )
    queries = [query for sql in blocks("sql") for query in sql.split(";") if query.strip()]

    async def is_visible() -> bool:
        return bool(await road.fetch(queries[0]))

    await road.until(is_visible)
    answers = [await road.fetch(query) for query in queries]

    assert re.fullmatch(r"file-events:\d:0", done.stdout.strip())
    # One file, its one event, no duplicates, one minute, four projections of the feed and the dead letters' on four
    # partitions each, an answer, no dead letter.
    assert [len(answer) for answer in answers] == [1, 1, 0, 1, 20, 1, 0]


def test_the_commands_of_the_readme_exist() -> None:
    """Each `stampline` command and each make target that is named can be called."""
    commands = set(re.findall(r"stampline ([a-z]+)", _README)) & set(re.findall(r"`?stampline ([a-z]+)[ `\n]", _README))
    shown = set(re.findall(r"^[|$] `?(?:\$ )?stampline ([a-z]+)", _README, flags=re.MULTILINE))
    targets = set(re.findall(r"make ([a-z]+)", _README))
    makefile = (_ROOT / "Makefile").read_text()

    assert shown
    assert shown <= commands
    assert shown <= set(cli.list_commands(None))  # type: ignore[arg-type]
    assert {target for target in targets if f"\n{target}:" not in makefile} == set()


def test_the_files_of_the_readme_exist() -> None:
    """Every link and every path in code leads to a file of this repository."""
    links = re.findall(r"\]\(([^)#:]+)\)", _README)
    paths = re.findall(r"`((?:pipeline|agents|tables|projections|deployment|tests)/[\w./]+)`", _README)

    assert links
    assert [path for path in links + paths if not (_ROOT / path).exists()] == []


def test_ci_runs_the_test_command_of_the_readme() -> None:
    """CI and a reader run the same tests."""
    assert "$ make test\n" in _README
    assert re.search(r"^(exec )?make test$", (_ROOT / ".ci" / "run").read_text(), flags=re.MULTILINE)
