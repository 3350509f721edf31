"""The wheel: our five packages, all of their files, importable without the repository, and nobody else's names."""

from __future__ import annotations

import importlib
import importlib.metadata
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

pytestmark = pytest.mark.unit

ROOT = Path(__file__).parents[2]
PACKAGES = ("pipeline", "agents", "tables", "projections", "migrations")

# Imports every module of a package from the folder given, with the repository out of reach.
IMPORT_ALL = """
import importlib, pathlib, pkgutil, sys
target, root, name = sys.argv[1:]
sys.path[:] = [target] + [entry for entry in sys.path if pathlib.Path(entry or ".").resolve() != pathlib.Path(root)]
package = importlib.import_module(name)
assert pathlib.Path(package.__file__).is_relative_to(target), package.__file__
for module in pkgutil.walk_packages(package.__path__, name + "."):
    # These two do something when they are imported: start the program, run a migration.
    if module.name.rpartition(".")[2] not in ("__main__", "env"):
        importlib.import_module(module.name)
"""


@pytest.mark.parametrize("name", PACKAGES)
def test_no_other_distribution_has_our_names(name: str) -> None:
    """`tables` is also PyTables, `agents` is also openai-agents: neither may be installed beside stampline."""
    owners = set(importlib.metadata.packages_distributions().get(name, []))
    assert owners <= {"stampline"}, f"`{name}` comes from {owners} too: uninstall that distribution"
    assert Path(importlib.import_module(name).__file__ or "").is_relative_to(ROOT)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built as a release is."""
    folder = tmp_path_factory.mktemp("wheel")
    _run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder), str(ROOT))
    [built] = folder.glob("stampline-*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the wheel installed in it, and nothing else."""
    folder = tmp_path_factory.mktemp("installed")
    options = ("--quiet", "--no-deps", "--no-index", "--disable-pip-version-check")
    _run(sys.executable, "-m", "pip", "install", *options, "--target", str(folder), str(wheel))
    return folder


def test_the_wheel_holds_exactly_our_packages(wheel: Path) -> None:
    """No tests, no deployment, no dashboards."""
    with zipfile.ZipFile(wheel) as archive:
        top = {name.split("/")[0] for name in archive.namelist()}
    assert {name for name in top if not name.endswith(".dist-info")} == set(PACKAGES)


def test_the_wheel_holds_every_file_of_them(wheel: Path) -> None:
    """SQL, JSON Schema, templates and py.typed are part of the program."""
    ours = {
        str(path.relative_to(ROOT))
        for name in PACKAGES
        for path in (ROOT / name).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts and path.name != ".gitkeep"
    }
    with zipfile.ZipFile(wheel) as archive:
        shipped = {name for name in archive.namelist() if ".dist-info/" not in name}
    assert ours - shipped == set()
    assert {"pipeline/py.typed", "pipeline/events.schema.json"} <= shipped


@pytest.mark.parametrize("name", PACKAGES)
def test_every_module_imports_from_the_wheel_alone(installed: Path, name: str) -> None:
    """From another folder and without the repository: a forgotten file shows here and not in the image."""
    _run(sys.executable, "-P", "-c", IMPORT_ALL, str(installed), str(ROOT), name, cwd="/")


def _run(*command: str, cwd: str | None = None) -> None:
    done = subprocess.run(command, check=False, capture_output=True, text=True, cwd=cwd, timeout=100)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout}\n{done.stderr}"
