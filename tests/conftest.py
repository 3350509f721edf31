"""What all tests share; the fixtures stand in `fix_*.py`, one module for each concern."""

from __future__ import annotations

pytest_plugins = ["tests.fix_services", "tests.fix_road", "tests.fix_secure", "tests.lane_fakes"]
