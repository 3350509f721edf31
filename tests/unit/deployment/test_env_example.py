"""`deployment/env.example` is complete and current."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from pipeline.settings import Settings, env_example, load_settings

pytestmark = pytest.mark.unit

EXAMPLE = Path(__file__).parents[3] / "deployment" / "env.example"


def test_env_example_is_current() -> None:
    """The file is what the settings say: every field with its description and its default."""
    assert EXAMPLE.read_text() == env_example(), "deployment/env.example is out of date: run `make env-example`"


def test_env_example_names_every_field_and_describes_it() -> None:
    """No variable is missing, and none is without words."""
    named = re.findall(r"^# ([A-Z_]+)=", EXAMPLE.read_text(), flags=re.MULTILINE)
    assert named == [name.upper() for name in Settings.model_fields]
    assert all(field.description for field in Settings.model_fields.values())


def test_env_example_holds_the_defaults(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With every line uncommented nothing changes."""
    for name in Settings.model_fields:
        monkeypatch.delenv(name.upper(), raising=False)
    monkeypatch.chdir(tmp_path)
    defaults = load_settings()
    (tmp_path / ".env").write_text(re.sub(r"^# ([A-Z_]+=)", r"\1", EXAMPLE.read_text(), flags=re.MULTILINE))
    assert load_settings() == defaults
