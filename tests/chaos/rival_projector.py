"""A projector that does not belong: in a consumer group of its own it takes every partition that others own."""

from __future__ import annotations

import sys

from agents import projector
from pipeline.cli.main import main

projector.APP_ID = "stampline-projector-rival"  # type: ignore[misc]

if __name__ == "__main__":
    sys.exit(main(["worker", "projector"]))
