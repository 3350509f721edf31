"""Logging: every line of the process in one shape, whoever wrote it."""

from __future__ import annotations

import io
import json
import logging
import os
import re
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import structlog
from pydantic import SecretStr

from pipeline.logs import configure, get_logger, keep_silent
from pipeline.settings import Settings

pytestmark = pytest.mark.unit


@pytest.fixture(autouse=True)
def _restore() -> Iterator[None]:
    """Give pytest its own logging back."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)
    logging.captureWarnings(capture=False)
    structlog.reset_defaults()


@pytest.fixture
def output() -> io.StringIO:
    """What was logged."""
    return io.StringIO()


def _lines(output: io.StringIO) -> list[dict[str, Any]]:
    return [json.loads(line) for line in output.getvalue().splitlines()]


def test_a_line_has_the_promised_shape(output: io.StringIO) -> None:
    """Time with milliseconds and Z, level in upper case, logger, event, then the values."""
    configure(Settings(log_format="json"), stream=output)
    get_logger("stampline.test").info("batch_committed", records=3, duration_ms=1.5)
    [line] = _lines(output)
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", line.pop("timestamp"))
    assert line == {
        "level": "INFO",
        "logger": "stampline.test",
        "event": "batch_committed",
        "records": 3,
        "duration_ms": 1.5,
    }


def test_lines_of_other_libraries_have_it_too(output: io.StringIO) -> None:
    """Their arguments are put in, their extra values are kept."""
    configure(Settings(log_format="json"), stream=output)
    logging.getLogger("some.library").warning("took %d ms", 7, extra={"node": 1})
    [line] = _lines(output)
    assert (line["level"], line["logger"], line["event"], line["node"]) == ("WARNING", "some.library", "took 7 ms", 1)


@pytest.mark.parametrize("foreign", [False, True])
def test_an_exception_stays_on_its_line(output: io.StringIO, *, foreign: bool) -> None:
    """The traceback is a value: one event, one line."""
    configure(Settings(log_format="json"), stream=output)
    try:
        os.environ["BOOM"]
    except KeyError:
        (logging.getLogger("other") if foreign else get_logger("ours")).exception("it_failed")
    [line] = _lines(output)
    assert line["level"] == "ERROR"
    assert "KeyError: 'BOOM'" in line["exception"]


def test_what_json_cannot_hold_does_not_lose_the_line(output: io.StringIO) -> None:
    """A file name that is not UTF-8, a huge number, an odd key, an object."""
    configure(Settings(log_format="json"), stream=output)
    log = get_logger("ours")
    log.info("a", path="bad-\udcff")
    log.info("b", number=2**70)
    log.info("c", values={1: "one"}, thing=object)
    first, second, third = _lines(output)
    assert first["path"] == "bad-\udcff"
    assert second["number"] == 2**70
    assert third["values"] == {"1": "one"}


def test_a_secret_stays_one(output: io.StringIO) -> None:
    """A secret that is logged by mistake shows as stars."""
    configure(Settings(log_format="json"), stream=output)
    get_logger("ours").info("connected", password=SecretStr("hunter2"), settings=Settings(postgres_password="hunter2"))
    assert "hunter2" not in output.getvalue()


def test_the_level_is_kept_and_chatty_libraries_are_quiet(output: io.StringIO) -> None:
    """INFO of a driver is for its developers; its warnings are for the operator."""
    configure(Settings(log_format="json", log_level="INFO"), stream=output)
    get_logger("ours").debug("hidden")
    get_logger("ours").info("shown")
    logging.getLogger("aiokafka.consumer").info("hidden")
    logging.getLogger("aiokafka.consumer").warning("shown")
    assert [line["event"] for line in _lines(output)] == ["shown", "shown"]


def test_a_warning_is_a_line(output: io.StringIO) -> None:
    """Python's own warnings come as JSON too."""
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        configure(Settings(log_format="json"), stream=output)
        warnings.warn("old", DeprecationWarning, stacklevel=1)
        logging.captureWarnings(capture=False)
    [line] = _lines(output)
    assert line["logger"] == "py.warnings"
    assert "DeprecationWarning: old" in line["event"]


def test_context_is_on_every_line(output: io.StringIO) -> None:
    """What is bound once, for example the role, is on each line of its task."""
    configure(Settings(log_format="json"), stream=output)
    with structlog.contextvars.bound_contextvars(role="reducer"):
        get_logger("ours").info("a")
        logging.getLogger("other").info("b")
    assert [line["role"] for line in _lines(output)] == ["reducer", "reducer"]


def test_auto_is_json_unless_a_person_watches(output: io.StringIO) -> None:
    """A pipe gets JSON, `console` is readable text, and neither gets colours."""
    configure(Settings(log_format="auto"), stream=output)
    get_logger("ours").info("to_a_pipe")
    assert _lines(output)[0]["event"] == "to_a_pipe"
    output.truncate(0)
    output.seek(0)
    configure(Settings(log_format="console"), stream=output)
    get_logger("ours").info("to_a_person", answer=42)
    assert "to_a_person" in output.getvalue()
    assert "answer=42" in output.getvalue()
    assert "\x1b" not in output.getvalue()


def test_to_configure_twice_says_nothing_twice(output: io.StringIO) -> None:
    """A command that loads its settings late configures again."""
    for _ in range(2):
        configure(Settings(log_format="json"), stream=output)
    get_logger("ours").info("once")
    assert len(_lines(output)) == 1


def test_a_command_that_has_not_set_up_logging_prints_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    """The standard output of a command is its data; what is wrong is its one line of error."""
    keep_silent()
    get_logger("stampline.test").warning("breaker_opened", failures=5)
    logging.getLogger("aiokafka").error("Unable connect to node")

    assert capsys.readouterr() == ("", "")


def test_a_driver_that_repeats_itself_is_heard_now_and_then(output: io.StringIO) -> None:
    """The same words of aiokafka pass once in a while, other words and other loggers always."""
    configure(Settings(log_format="json"), stream=output)
    for _ in range(5):
        logging.getLogger("aiokafka.conn").warning("Unable connect to node %s", 1)
        logging.getLogger("stampline").warning("mine")
    logging.getLogger("aiokafka.conn").warning("Unable connect to node %s", 2)

    said = [line["event"] for line in _lines(output)]
    assert said == ["Unable connect to node 1", *["mine"] * 5, "Unable connect to node 2"]
