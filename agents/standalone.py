"""`python -m agents.ROLE` is `stampline worker ROLE`."""

from __future__ import annotations

import importlib
import sys
from typing import NoReturn


def run_role(role: str) -> NoReturn:
    """Run one role as this process's command.

    The command line stands above the agents, so it is looked up here only when an agent's module is the program.
    """
    sys.exit(importlib.import_module("pipeline.cli.main").main(["worker", role]))
