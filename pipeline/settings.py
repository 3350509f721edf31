"""Every setting of stampline: the only module that reads the environment.

`Settings` is frozen and checked as a whole when it is made; all faults are reported at once, by the name of the
variable. The names of the variables are promises to users; `deployment/env.example` lists them all (tested).
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any, Literal, Self, get_args, get_origin
from urllib.parse import quote

from pydantic import Field, SecretStr, ValidationError, field_validator, model_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from pipeline.errors import SettingsError

_FILES = (
    "postgres_password_file",
    "postgres_ssl_ca",
    "kafka_sasl_password_file",
    "kafka_ssl_ca",
    "kafka_ssl_cert",
    "kafka_ssl_key",
)

Port = Annotated[int, Field(ge=0, le=65535)]


class Settings(BaseSettings):
    """All settings, one field for each variable (its name in lower case)."""

    model_config = SettingsConfigDict(
        frozen=True, extra="ignore", env_ignore_empty=True, validate_default=True, hide_input_in_errors=True
    )

    postgres_host: str = Field("localhost", description="host name of PostgreSQL, or the folder of its socket")
    postgres_port: Port = Field(5432, description="port of PostgreSQL")
    postgres_db: str = Field("metadata_stamping_dev", description="database")
    postgres_user: str | None = Field(None, description="role to connect as")
    postgres_password: SecretStr | None = Field(None, description="its password")
    postgres_password_file: Path | None = Field(None, description="file that holds the password instead")
    postgres_dsn: SecretStr | None = Field(None, description="whole connection string; overrides the five above")
    enable_ssl_database: bool = Field(False, description="true = TLS to PostgreSQL, with verification")
    postgres_ssl_ca: Path | None = Field(None, description="CA certificate of PostgreSQL; default: the system's")
    database_pool_min_size: int = Field(5, ge=1, le=1000, description="connections kept open by each process")
    database_pool_max_size: int = Field(20, ge=1, le=1000, description="most connections of each process")
    database_command_timeout_seconds: float = Field(60, gt=0, description="longest a statement may take, in s")
    db_circuit_breaker_failure_threshold: int = Field(
        5, ge=1, le=1000, description="failures in a row after which PostgreSQL is left alone"
    )
    db_circuit_breaker_recovery_timeout: float = Field(
        60, gt=0, le=3600, description="how long it is left alone before it is tried again, in s"
    )
    db_circuit_breaker_half_open_max_calls: int = Field(
        3, ge=1, le=1000, description="most calls at once while it is tried; so many successes end the pause"
    )
    postgres_pool_exhaustion_threshold: float = Field(
        0.90, gt=0, le=1, description="share of the connections in use from which on a warning is logged"
    )
    postgres_pool_exhaustion_log_interval: float = Field(
        60, ge=0, description="least time between two such warnings, in s"
    )
    postgres_max_metrics_stored: int = Field(
        10_000, ge=1000, le=1_000_000, description="statements whose duration is remembered"
    )

    kafka_bootstrap_servers: str = Field("localhost:9092", description="comma-separated host:port of the brokers")
    kafka_security_protocol: Literal["PLAINTEXT", "SSL", "SASL_PLAINTEXT", "SASL_SSL"] = Field(
        "PLAINTEXT", description="how to talk to the brokers"
    )
    kafka_sasl_mechanism: Literal["PLAIN", "SCRAM-SHA-256", "SCRAM-SHA-512"] = Field(
        "PLAIN", description="how to log in where the protocol is SASL_*"
    )
    kafka_sasl_username: str | None = Field(None, description="user name for SASL")
    kafka_sasl_password: SecretStr | None = Field(None, description="password for SASL")
    kafka_sasl_password_file: Path | None = Field(None, description="file that holds that password instead")
    kafka_ssl_ca: Path | None = Field(None, description="CA certificate of the brokers; default: the system's")
    kafka_ssl_cert: Path | None = Field(None, description="client certificate")
    kafka_ssl_key: Path | None = Field(None, description="its private key")
    kafka_transactions: Literal["auto", "on"] = Field(
        "auto", description="auto = on where the broker can; on = refuse to start without"
    )
    kafka_topic_prefix: str = Field(
        "",
        pattern=r"^[A-Za-z0-9._-]{0,100}$",
        description="put before every topic, consumer group and transactional id",
    )
    kafka_topic_partitions: int = Field(8, ge=1, le=1000, description="partitions of new topics")
    kafka_topic_replication_factor: int | None = Field(
        None, ge=1, le=32, description="replicas of new topics; default: the broker's"
    )
    kafka_session_timeout_ms: int = Field(
        6000, ge=1000, le=300_000, description="a node silent for so long loses its partitions, in ms"
    )
    kafka_group_instance_id: str | None = Field(
        None,
        pattern=r"^[A-Za-z0-9._-]{1,200}$",
        description="name of this process in its consumer groups, kept over a restart: then its partitions stay its own"
        " for the session timeout; default: none, partitions move at once",
    )
    kafka_request_timeout_ms: int = Field(20_000, ge=1000, le=300_000, description="longest wait for a broker, in ms")

    batch_records_max: int = Field(8000, ge=1, le=100_000, description="most records in one batch")
    batch_bytes_max: int = Field(16 * 2**20, ge=2**20, le=2**28, description="a batch is closed past so many bytes")
    revoke_timeout_ms: int = Field(
        2000, ge=10, description="how long a batch in flight may go on when its partition is revoked, in ms"
    )
    table_store: Literal["memory", "rocksdb"] = Field("memory", description="where the state of tables is kept")
    table_dir: Path | None = Field(None, description="folder for TABLE_STORE=rocksdb, of this process alone")
    table_standby_replicas: int = Field(
        # Not more: Faust's assignor, given two standbys, can go round in circles for ever.
        0,
        ge=0,
        le=1,
        description="1 = another node keeps a copy of each partition's state up to date",
    )
    retry_max_attempts: int = Field(5, ge=1, le=100, description="times an event from the future is sent in again")
    retry_backoff_base_ms: int = Field(10, ge=1, description="shortest pause before that, in ms")
    retry_backoff_cap_ms: int = Field(250, ge=1, description="longest pause before that, in ms")
    dedup_event_ids_max: int = Field(8, ge=0, le=1000, description="event ids remembered for each file")
    dedup_window_seconds: int = Field(6 * 3600, ge=0, description="how long an event id is remembered, in s")

    # A list would be read as JSON by pydantic-settings; the promise is a path like $PATH.
    allowed_roots: Annotated[tuple[Path, ...], NoDecode] = Field(
        (), description="colon-separated folders that file:// content may come from; empty = none"
    )
    content_inline_max_bytes: int = Field(2**20, ge=0, le=2**20, description="most bytes of inline content")
    content_fetch_timeout_seconds: float = Field(300, gt=0, description="longest a content may take to read, in s")
    hash_generator_pool_size: int = Field(50, ge=1, le=1000, description="most hash jobs under way at once")

    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = Field("INFO", description="least level that is logged")
    log_format: Literal["auto", "console", "json"] = Field(
        "auto", description="auto = console on a terminal, else JSON"
    )

    @field_validator("allowed_roots", mode="before")
    @classmethod
    def _split_roots(cls, value: Any) -> Any:
        if isinstance(value, str):
            return tuple(Path(part) for part in value.split(os.pathsep) if part)
        return value

    @field_validator("allowed_roots")
    @classmethod
    def _resolve_roots(cls, roots: tuple[Path, ...]) -> tuple[Path, ...]:
        for root in roots:
            if not root.is_absolute() or not root.is_dir():
                raise ValueError(f"{root} is not an absolute path of an existing folder")
        return tuple(root.resolve() for root in roots)

    @model_validator(mode="after")
    def _check_relations(self) -> Self:
        faults = []
        if self.database_pool_min_size > self.database_pool_max_size:
            faults.append("DATABASE_POOL_MIN_SIZE must not be greater than DATABASE_POOL_MAX_SIZE")
        if self.retry_backoff_base_ms > self.retry_backoff_cap_ms:
            faults.append("RETRY_BACKOFF_BASE_MS must not be greater than RETRY_BACKOFF_CAP_MS")
        if self.kafka_security_protocol.startswith("SASL"):
            because = f"needed with KAFKA_SECURITY_PROTOCOL={self.kafka_security_protocol}"
            if not self.kafka_sasl_username:
                faults.append(f"KAFKA_SASL_USERNAME is {because}")
            if self.kafka_sasl_password is None and self.kafka_sasl_password_file is None:
                faults.append(f"KAFKA_SASL_PASSWORD or KAFKA_SASL_PASSWORD_FILE is {because}")
        if self.table_store == "rocksdb" and self.table_dir is None:
            faults.append("TABLE_DIR is needed with TABLE_STORE=rocksdb: a folder that this process has for itself")
        if self.kafka_ssl_key is not None and self.kafka_ssl_cert is None:
            faults.append("KAFKA_SSL_CERT is needed with KAFKA_SSL_KEY")
        faults += _file_faults({name: getattr(self, name) for name in _FILES})
        if faults:
            raise ValueError("\n".join(faults))
        return self

    @property
    def postgres_url(self) -> str:
        """The connection string for asyncpg. It holds the password: never log it, use `postgres_place`."""
        if self.postgres_dsn is not None:
            return self.postgres_dsn.get_secret_value()
        user = quote(self.postgres_user or "", safe="")
        password = _secret(self.postgres_password, self.postgres_password_file)
        login = f"{user}:{quote(password, safe='')}@" if password else f"{user}@" if user else ""
        database = quote(self.postgres_db, safe="")
        if self.postgres_host.startswith("/"):
            return f"postgresql://{login}/{database}?host={quote(self.postgres_host)}&port={self.postgres_port}"
        host = f"[{self.postgres_host}]" if ":" in self.postgres_host else self.postgres_host
        return f"postgresql://{login}{host}:{self.postgres_port}/{database}"

    @property
    def postgres_place(self) -> str:
        """Where PostgreSQL is, for messages: no secret."""
        if self.postgres_dsn is not None:
            return "the server of POSTGRES_DSN"
        return f"{self.postgres_host}:{self.postgres_port}/{self.postgres_db}"

    @property
    def kafka_sasl_secret(self) -> str | None:
        """The password for SASL, from its variable or its file."""
        return _secret(self.kafka_sasl_password, self.kafka_sasl_password_file)


def _file_faults(paths: dict[str, Path | None]) -> list[str]:
    faults = []
    for name, path in paths.items():
        if path is not None and not path.is_file():
            faults.append(f"{name.upper()}: no file {path}")
        elif path is not None and not os.access(path, os.R_OK):
            faults.append(f"{name.upper()}: may not be read: {path}")
        elif path is not None and name.endswith("password_file") and not _is_text(path):
            faults.append(f"{name.upper()}: is no text: {path}")
    return faults


def _is_text(path: Path) -> bool:
    try:
        path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        return False
    return True


def _secret(value: SecretStr | None, path: Path | None) -> str | None:
    if value is not None:
        return value.get_secret_value()
    return path.read_text().rstrip("\r\n") if path is not None else None


def load_settings(**overrides: Any) -> Settings:
    """Read the settings from the environment and from `.env` in the working directory; `overrides` win.

    Raises:
        SettingsError: with one line for each fault, every one naming its variable.
    """
    assert overrides.keys() <= Settings.model_fields.keys(), "an override is no field of Settings"
    try:
        return Settings(_env_file=".env", **overrides)
    except ValidationError as exc:
        raise SettingsError("\n".join(_faults(exc, overrides))) from exc


def _faults(error: ValidationError, overrides: dict[str, Any]) -> list[str]:
    """Return one line for each fault.

    Relations are checked only where each value is good by itself. To report all at once they are checked here with
    the bad values replaced by their defaults; what is then said of a variable that is bad anyway is left out.
    """
    lines = []
    bad = set()
    for fault in error.errors(include_url=False, include_input=False):
        message = fault["msg"].removeprefix("Value error, ")
        if fault["loc"]:
            name = str(fault["loc"][0])
            bad.add(name)
            lines.append(f"{name.upper()}: {message}")
        else:
            lines.extend(message.split("\n"))
    if bad:
        fields = Settings.model_fields
        try:
            Settings(_env_file=".env", **{**overrides, **{name: fields[name].default for name in bad}})
        except ValidationError as exc:
            names = tuple(name.upper() for name in bad)
            lines.extend(line for line in _faults(exc, {}) if not any(name in line for name in names))
    return lines


def env_example() -> str:
    """Return the text of `deployment/env.example`: every variable, commented out, with what it is and its default."""
    lines = [
        "# Every setting of stampline with its default; generated by `make env-example`.",
        "# Copy it to .env in the working directory, or set the variables in the environment, which wins.",
    ]
    for name, field in Settings.model_fields.items():
        choices = get_args(field.annotation) if get_origin(field.annotation) is Literal else ()
        told = f"{field.description} ({', '.join(choices)})" if choices else field.description
        lines += ["", f"# {told}", f"# {name.upper()}={_written(field.default)}"]
    return "\n".join(lines) + "\n"


def _written(value: Any) -> str:
    """Return a default as it stands in the environment."""
    if isinstance(value, bool):
        return str(value).lower()
    return "" if value is None or value == () else str(value)
