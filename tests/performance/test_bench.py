"""`stampline bench`: its report is complete, and a run counts only if every event is there exactly once."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = [
    pytest.mark.performance,
    pytest.mark.skipif(shutil.which("java") is None, reason="the bench runs Apache Kafka, which needs Java"),
]

_ROOT = Path(__file__).parents[2]
_COMMAND = "import sys; from pipeline.cli.bench import command; sys.exit(command())"
_EVENTS = 8000


@pytest.fixture(scope="module")
def report() -> dict[str, Any]:
    """What a short bench prints for machines."""
    arguments = ("--events", str(_EVENTS), "--uris", "500", "--json")
    done = subprocess.run(
        [sys.executable, "-c", _COMMAND, *arguments], cwd=_ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def test_both_systems_are_measured_on_all_events(report: dict[str, Any]) -> None:
    """The chain and the limit each have a run that ended with all events, and rates that are compared."""
    assert [run["system"] for run in report["runs"]] == ["chain", "limit"]
    for run in report["runs"]:
        assert run["measured"]["samples"][-1][1] == _EVENTS
        assert run["measured"]["events_per_second"] > 0
    assert report["chain_to_limit"] > 0


def test_every_process_has_its_cpu_time(report: dict[str, Any]) -> None:
    """The roles, the limit and both services are told apart, and so is the load by others."""
    assert set(report["chain"]["cpu_us_per_event"]) == {"hasher", "reducer", "projector", "kafka", "postgres"}
    assert set(report["limit"]["cpu_us_per_event"]) == {"limit", "kafka", "postgres"}
    assert report["foreign_load_percent"] >= 0


def test_a_report_says_where_it_comes_from(report: dict[str, Any]) -> None:
    """Numbers without the machine, the versions and the load mean nothing."""
    assert set(report["machine"]) == {"cores", "cpu", "memory_bytes"}
    assert set(report["versions"]) == {"stampline", "python", "kafka", "postgres"}
    assert (report["events"], report["uris"], report["partitions"], report["content_bytes"]) == (8000, 500, 8, 1024)
