"""What all tests share; the fixtures stand in `fix_*.py`, one module for each concern."""

from __future__ import annotations

import hypothesis

pytest_plugins = ["tests.fix_services", "tests.fix_road", "tests.fix_secure", "tests.fix_proxy", "tests.lane_fakes"]

# How long an example takes is the machine's business: a deadline would fail by chance on a busy one.
hypothesis.settings.register_profile("stampline", deadline=None)
hypothesis.settings.load_profile("stampline")
