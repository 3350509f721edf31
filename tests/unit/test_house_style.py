"""The house style, where a linter does not see it: sizes, names, docstrings, and a layer for every module."""

from __future__ import annotations

import ast
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

pytestmark = pytest.mark.unit

ROOT = Path(__file__).parents[2]
PACKAGES = ("pipeline", "agents", "tables", "projections", "migrations")
MODULES = sorted(path for folder in (*PACKAGES, "tests") for path in (ROOT / folder).rglob("*.py"))
FUNCTION_LINES_MAX = 70
MODULE_LINES_MAX = 450  # the aim is 300
BANNED_NAMES = {"utils", "util", "helpers", "helper", "common", "base", "misc"}

every_module = pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))


def _functions(tree: ast.Module) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    return (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))


@every_module
def test_functions_are_short(path: Path) -> None:
    """A function fits on one screen."""
    long = {
        f"{path.relative_to(ROOT)}:{function.lineno} {function.name}: {lines} lines"
        for function in _functions(ast.parse(path.read_text()))
        if (lines := (function.end_lineno or 0) - function.lineno + 1) > FUNCTION_LINES_MAX
    }
    assert not long, f"functions have at most {FUNCTION_LINES_MAX} lines"


@every_module
def test_modules_are_short_and_say_what_they_are(path: Path) -> None:
    """A module is one subject, and its docstring names it."""
    text = path.read_text()
    assert len(text.splitlines()) <= MODULE_LINES_MAX, f"{path} is too long: make two modules of it"
    assert ast.get_docstring(ast.parse(text)), f"{path} has no docstring"


@every_module
def test_names_say_something(path: Path) -> None:
    """A module called after nothing collects everything."""
    assert path.stem not in BANNED_NAMES


@every_module
def test_only_the_command_line_prints(path: Path) -> None:
    """Standard output is data; everything else is logged. A run that measures prints what it has measured."""
    if any(path.is_relative_to(ROOT / folder) for folder in ("pipeline/cli", "tests/chaos", "tests/performance")):
        return
    calls = (node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call))
    lines = [call.lineno for call in calls if isinstance(call.func, ast.Name) and call.func.id == "print"]
    assert not lines, f"{path}: print() in lines {lines}"


@every_module
def test_a_test_says_which_behaviour_it_proves(path: Path) -> None:
    """The docstring of a test is the promise."""
    if not path.is_relative_to(ROOT / "tests"):
        return
    silent = [
        function.name
        for function in _functions(ast.parse(path.read_text()))
        if function.name.startswith("test_") and not ast.get_docstring(function)
    ]
    assert not silent, f"{path}: no docstring in {silent}"


def test_every_module_has_its_layer() -> None:
    """A module that `[tool.importlinter]` does not name could import anything."""
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    [layers] = [contract["layers"] for contract in contracts if contract["type"] == "layers"]
    named = {name.strip(" ()") for layer in layers for name in layer.replace("|", ":").split(":")}
    modules = {f"pipeline.{path.stem}" for path in (ROOT / "pipeline").glob("*.py") if path.stem != "__init__"}
    folders = {f"pipeline.{path.parent.name}" for path in (ROOT / "pipeline").glob("*/__init__.py")}
    everything = modules | folders | set(PACKAGES) - {"pipeline"}
    assert not everything - named, "name them in [tool.importlinter], contract `direction`"
