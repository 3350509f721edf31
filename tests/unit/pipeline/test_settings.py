"""Settings: where they come from, what is checked, and what is never shown."""

from __future__ import annotations

import traceback
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from pipeline.errors import SettingsError
from pipeline.settings import Settings, load_settings

pytestmark = pytest.mark.unit


@pytest.fixture(autouse=True)
def _clean_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No variable of the machine and no `.env` of the working directory reaches a test."""
    for name in Settings.model_fields:
        monkeypatch.delenv(name.upper(), raising=False)
    monkeypatch.chdir(tmp_path)


def _faults() -> list[str]:
    with pytest.raises(SettingsError) as caught:
        load_settings()
    return str(caught.value).split("\n")


def test_the_defaults_are_valid() -> None:
    """A start needs no variable."""
    settings = load_settings()
    assert settings.kafka_bootstrap_servers == "localhost:9092"
    assert settings.postgres_url == "postgresql://localhost:5432/metadata_stamping_dev"
    assert settings.allowed_roots == ()


def test_the_environment_wins_over_the_file_and_overrides_win_over_both(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An empty variable counts as not set."""
    (tmp_path / ".env").write_text("POSTGRES_HOST=file\nPOSTGRES_DB=file\nPOSTGRES_USER=file\nUNKNOWN=1\n")
    monkeypatch.setenv("POSTGRES_DB", "environment")
    monkeypatch.setenv("POSTGRES_USER", "environment")
    monkeypatch.setenv("POSTGRES_PORT", "")
    settings = load_settings(postgres_user="override")
    assert settings.postgres_place == "file:5432/environment"
    assert settings.postgres_user == "override"


def test_settings_are_frozen() -> None:
    """Nobody changes a setting under a running process."""
    with pytest.raises(ValidationError, match="frozen"):
        load_settings().postgres_port = 1  # type: ignore[misc]


def test_all_faults_are_told_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bad values and bad relations, each by the name of its variable."""
    monkeypatch.setenv("POSTGRES_PORT", "70000")
    monkeypatch.setenv("LOG_LEVEL", "LOUD")
    monkeypatch.setenv("RETRY_BACKOFF_BASE_MS", "500")
    monkeypatch.setenv("KAFKA_SSL_CA", "/nowhere/ca.pem")
    faults = _faults()
    assert [fault.split()[0].rstrip(":") for fault in faults] == [
        "POSTGRES_PORT",
        "LOG_LEVEL",
        "RETRY_BACKOFF_BASE_MS",
        "KAFKA_SSL_CA",
    ]


def test_a_bad_value_is_told_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A relation with a value that is bad by itself would only confuse."""
    monkeypatch.setenv("DATABASE_POOL_MIN_SIZE", "many")
    monkeypatch.setenv("DATABASE_POOL_MAX_SIZE", "2")
    assert len(_faults()) == 1


@pytest.mark.parametrize(
    ("variables", "words"),
    [
        ({"DATABASE_POOL_MIN_SIZE": "9", "DATABASE_POOL_MAX_SIZE": "8"}, "DATABASE_POOL_MIN_SIZE must not be greater"),
        ({"RETRY_BACKOFF_BASE_MS": "300"}, "RETRY_BACKOFF_BASE_MS must not be greater"),
        ({"KAFKA_SECURITY_PROTOCOL": "SASL_SSL", "KAFKA_SASL_PASSWORD": "x"}, "KAFKA_SASL_USERNAME is needed"),
        ({"KAFKA_SECURITY_PROTOCOL": "SASL_SSL", "KAFKA_SASL_USERNAME": "x"}, "KAFKA_SASL_PASSWORD or"),
        ({"TABLE_STORE": "rocksdb"}, "TABLE_DIR is needed"),
        ({"KAFKA_SSL_KEY": __file__}, "KAFKA_SSL_CERT is needed"),
        ({"KAFKA_SSL_CERT": "/nowhere"}, "KAFKA_SSL_CERT: no file /nowhere"),
        ({"POSTGRES_PASSWORD_FILE": "/nowhere"}, "POSTGRES_PASSWORD_FILE: no file /nowhere"),
        ({"ALLOWED_ROOTS": "/nowhere"}, "ALLOWED_ROOTS: /nowhere is not an absolute path of an existing folder"),
        ({"ALLOWED_ROOTS": "tmp"}, "ALLOWED_ROOTS: tmp is not"),
        ({"KAFKA_TOPIC_PREFIX": "a/b"}, "KAFKA_TOPIC_PREFIX: "),
    ],
)
def test_each_fault_names_its_variable(variables: dict[str, str], words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is wrong, by the name that the operator has to change."""
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    [fault] = _faults()
    assert fault.startswith(words)


def test_no_secret_is_ever_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not in the settings' text, not in a fault, not in the traceback of a fault."""
    for name in ("POSTGRES_PASSWORD", "POSTGRES_DSN", "KAFKA_SASL_PASSWORD"):
        monkeypatch.setenv(name, "hunter2")
    settings = load_settings()
    assert "hunter2" not in f"{settings!r} {settings} {settings.model_dump()} {settings.model_dump_json()}"
    assert "hunter2" not in settings.postgres_place
    monkeypatch.setenv("RETRY_BACKOFF_BASE_MS", "300")
    with pytest.raises(SettingsError) as caught:
        load_settings()
    assert "hunter2" not in "".join(traceback.format_exception(caught.value))


def test_a_password_file_that_is_no_text_is_told(tmp_path: Path) -> None:
    """A file of bytes that nobody could have typed names its variable."""
    (tmp_path / "password").write_bytes(b"\xff\xfe\x00")

    with pytest.raises(SettingsError, match="POSTGRES_PASSWORD_FILE: is no text"):
        load_settings(postgres_password_file=tmp_path / "password")


def test_a_password_may_come_from_a_file(tmp_path: Path) -> None:
    """As Docker and Kubernetes give it, with or without a newline at its end."""
    (tmp_path / "password").write_text("s3cret\n")
    settings = load_settings(
        postgres_user="ann",
        postgres_password_file=tmp_path / "password",
        kafka_sasl_password_file=tmp_path / "password",
    )
    assert settings.postgres_url == "postgresql://ann:s3cret@localhost:5432/metadata_stamping_dev"
    assert settings.kafka_sasl_secret == "s3cret"


@pytest.mark.parametrize(
    ("values", "url"),
    [
        ({"postgres_user": "a@b", "postgres_password": "p:/?#"}, "postgresql://a%40b:p%3A%2F%3F%23@h:5/d"),
        ({"postgres_user": "ann"}, "postgresql://ann@h:5/d"),
        ({"postgres_host": "/run/pg sql"}, "postgresql:///d?host=/run/pg%20sql&port=5"),
        ({"postgres_host": "::1"}, "postgresql://[::1]:5/d"),
        ({"postgres_db": "a/b c"}, "postgresql://h:5/a%2Fb%20c"),
        ({"postgres_dsn": "postgresql://elsewhere/x"}, "postgresql://elsewhere/x"),
    ],
)
def test_the_connection_string(values: dict[str, Any], url: str) -> None:
    """Names and passwords with special characters, a socket's folder, IPv6, and a whole DSN."""
    fixed: dict[str, Any] = {"postgres_host": "h", "postgres_port": 5, "postgres_db": "d"}
    assert load_settings(**(fixed | values)).postgres_url == url


def test_allowed_roots_are_resolved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Colon-separated like PATH; a symlink stands for what it leads to, and empty parts for nothing."""
    (tmp_path / "real").mkdir()
    (tmp_path / "alias").symlink_to("real")
    monkeypatch.setenv("ALLOWED_ROOTS", f"{tmp_path}/alias::{tmp_path}")
    assert load_settings().allowed_roots == (tmp_path / "real", tmp_path)
