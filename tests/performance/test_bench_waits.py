"""`stampline bench --wait`: every event is waited for, and the times are told."""

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


def test_each_event_is_reached_and_timed() -> None:
    """The report has all events at about the rate that was asked for, and no time is less than that to Kafka."""
    done = subprocess.run(
        [sys.executable, "-m", "pipeline", "bench", "--wait", "--rate", "50", "--seconds", "2", "--json"],
        cwd=_ROOT,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    report: dict[str, Any] = json.loads(done.stdout)

    assert report["events"] == 100
    assert 25 < report["events_per_second"] < 60
    assert 0 < report["sent_ms_p50"] <= report["reached_ms_p50"] <= report["reached_ms_p99"] <= report["reached_ms_max"]
    assert report["foreign_load_percent"] >= 0
    assert set(report["versions"]) == {"stampline", "python", "kafka", "postgres"}
