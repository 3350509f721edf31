"""Kafka and PostgreSQL for the tests, chosen by TEST_SERVICES and started once, when the first test asks for them.

======== =========================================================================================================
external what KAFKA_BOOTSTRAP_SERVERS and POSTGRES_DSN or POSTGRES_HOST point to
docker   Apache Kafka and PostgreSQL in containers (testcontainers)
kafka    Apache Kafka from Maven Central, on this machine's Java, and PostgreSQL from a wheel
embedded the embedded broker, which has no transactions, and PostgreSQL from a wheel
auto     the first of these that can be had: the default
======== =========================================================================================================

The header of the test run tells the choice. A kind that cannot be had is an error, never a skipped test. A test that
kills a server starts its own by `pipeline.embedded.run_services`: these here are for all.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import uuid
from collections.abc import Callable, Coroutine, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args
from urllib.parse import urlsplit, urlunsplit

import asyncpg
import pytest

from pipeline.embedded import run_services
from pipeline.settings import Settings, load_settings

Kind = Literal["external", "docker", "kafka", "embedded"]
MakeSettings = Callable[..., Settings]

_kind_key = pytest.StashKey[tuple[Kind, str]]()


@dataclass(frozen=True)
class SharedServices:
    """The services of this test run."""

    kind: Kind
    kafka_bootstrap_servers: str
    postgres_dsn: str


def pytest_configure(config: pytest.Config) -> None:
    """Choose the services, before any test is collected."""
    config.stash[_kind_key] = _choose(os.environ.get("TEST_SERVICES", "auto"))


def pytest_report_header(config: pytest.Config) -> str:
    """Tell which services the tests run on, and why."""
    (kind, reason) = config.stash[_kind_key]
    return f"services: {kind} ({reason})"


@pytest.fixture(scope="session")
def services(request: pytest.FixtureRequest) -> Iterator[SharedServices]:
    """Running Kafka and PostgreSQL, shared by all tests: use topics below `topic_prefix` and a `database`."""
    (kind, _) = request.config.stash[_kind_key]
    runners: dict[Kind, Callable[[], AbstractContextManager[SharedServices]]] = {
        "external": _use_external,
        "docker": _run_containers,
        "kafka": lambda: _run_local("kafka"),
        "embedded": lambda: _run_local("embedded"),
    }
    with runners[kind]() as running:
        yield running


@pytest.fixture(scope="session")
def template_database(services: SharedServices) -> Iterator[str]:
    """The name of a database with all migrations applied, to be copied."""
    from migrations.run import upgrade  # noqa: PLC0415 - most tests need neither alembic nor a database

    name = f"stampline_template_{uuid.uuid4().hex[:12]}"
    _execute(services.postgres_dsn, f'CREATE DATABASE "{name}"')
    try:
        _in_thread(lambda: upgrade(with_database(services.postgres_dsn, name)))
        yield name
    finally:
        _execute(services.postgres_dsn, f'DROP DATABASE "{name}" WITH (FORCE)')


@pytest.fixture
def database(services: SharedServices, template_database: str) -> Iterator[str]:
    """The connection string of a database of this test alone, with all migrations applied and no rows."""
    name = f"stampline_test_{uuid.uuid4().hex[:12]}"
    _execute(services.postgres_dsn, f'CREATE DATABASE "{name}" TEMPLATE "{template_database}"')
    try:
        yield with_database(services.postgres_dsn, name)
    finally:
        _execute(services.postgres_dsn, f'DROP DATABASE "{name}" WITH (FORCE)')


@pytest.fixture
def topic_prefix() -> str:
    """What every topic, group and transactional id of this test begins with."""
    return f"t-{uuid.uuid4().hex[:12]}-"


@pytest.fixture
def make_settings(services: SharedServices, database: str, topic_prefix: str) -> MakeSettings:
    """Make settings for this test's services; every setting may be given, nothing comes from the environment."""

    def make(**overrides: Any) -> Settings:
        ours = {
            "kafka_bootstrap_servers": services.kafka_bootstrap_servers,
            "postgres_dsn": database,
            "kafka_topic_prefix": topic_prefix,
        }
        return make_settings_for(**{**ours, **overrides})

    return make


@pytest.fixture
def settings(make_settings: MakeSettings) -> Settings:
    """Settings for this test's services, otherwise the defaults."""
    return make_settings()


def make_settings_for(**overrides: Any) -> Settings:
    """Make settings: these, a small pool of connections, otherwise the defaults; nothing from the environment."""
    defaults = {name: field.get_default(call_default_factory=True) for name, field in Settings.model_fields.items()}
    pool = {"database_pool_min_size": 1, "database_pool_max_size": 5}
    return load_settings(**{**defaults, **pool, **overrides})


def with_database(dsn: str, name: str) -> str:
    """Return the connection string with another database in it."""
    return urlunsplit(urlsplit(dsn)._replace(path=f"/{name}"))


def _choose(wish: str) -> tuple[Kind, str]:
    """Choose the kind of services and say why.

    Raises:
        pytest.UsageError: the wish cannot be had; says why.
    """
    obstacles: dict[Kind, Callable[[], str | None]] = {
        "external": _why_not_external,
        "docker": _why_not_docker,
        "kafka": _why_not_kafka,
        "embedded": lambda: None,
    }
    if wish == "auto":
        reasons: list[str] = []
        for kind, why_not in obstacles.items():
            obstacle = why_not()
            if obstacle is None:
                return kind, f"TEST_SERVICES=auto; {'; '.join(reasons)}" if reasons else "TEST_SERVICES=auto"
            reasons.append(f"not {kind}: {obstacle}")
    for kind in get_args(Kind):
        if wish == kind:
            obstacle = obstacles[kind]()
            if obstacle is not None:
                raise pytest.UsageError(f"TEST_SERVICES={wish} cannot be had: {obstacle}")
            return kind, f"TEST_SERVICES={wish}"
    raise pytest.UsageError(f"TEST_SERVICES={wish} is none of auto, {', '.join(get_args(Kind))}")


def _why_not_external() -> str | None:
    if not os.environ.get("KAFKA_BOOTSTRAP_SERVERS"):
        return "KAFKA_BOOTSTRAP_SERVERS is not set"
    if not os.environ.get("POSTGRES_DSN") and not os.environ.get("POSTGRES_HOST"):
        return "neither POSTGRES_DSN nor POSTGRES_HOST is set"
    return None


def _why_not_docker() -> str | None:
    # Importing the client takes a third of a second, which every run of the unit tests would pay.
    if not os.environ.get("DOCKER_HOST") and not Path("/var/run/docker.sock").exists():
        return "DOCKER_HOST is not set and there is no /var/run/docker.sock"
    import docker  # type: ignore[import-untyped]  # noqa: PLC0415 - see above
    from docker.errors import DockerException  # type: ignore[import-untyped]  # noqa: PLC0415 - see above

    try:
        client = docker.from_env(timeout=3)
    except DockerException as exc:
        return f"Docker does not answer: {exc}"
    try:
        client.ping()
    except (DockerException, OSError) as exc:
        return f"Docker does not answer: {exc}"
    finally:
        client.close()
    return None


def _why_not_kafka() -> str | None:
    missing = [name for name in ("java", "mvn") if shutil.which(name) is None]
    return f"no {' and no '.join(missing)} on the PATH" if missing else None


@contextmanager
def _use_external() -> Iterator[SharedServices]:
    settings = load_settings()
    yield SharedServices("external", settings.kafka_bootstrap_servers, settings.postgres_url)


@contextmanager
def _run_local(broker: Literal["kafka", "embedded"]) -> Iterator[SharedServices]:
    with run_services(broker=broker, database=True, data=None, say=print) as running:
        assert running.kafka_bootstrap_servers is not None
        assert running.postgres_dsn is not None
        yield SharedServices(broker, running.kafka_bootstrap_servers, running.postgres_dsn)


@contextmanager
def _run_containers() -> Iterator[SharedServices]:
    from testcontainers.community.kafka import KafkaContainer  # noqa: PLC0415 - slow, and not always needed
    from testcontainers.community.postgres import PostgresContainer  # noqa: PLC0415 - the same

    kafka = KafkaContainer().with_kraft()
    for name, value in {
        # As in pipeline/servers/brokers.py: the tests rely on them.
        "KAFKA_AUTO_CREATE_TOPICS_ENABLE": "false",
        "KAFKA_GROUP_INITIAL_REBALANCE_DELAY_MS": "0",
        "KAFKA_GROUP_MIN_SESSION_TIMEOUT_MS": "1000",
        "KAFKA_MESSAGE_MAX_BYTES": str(16 * 2**20),
        "KAFKA_OFFSETS_TOPIC_NUM_PARTITIONS": "4",
        "KAFKA_TRANSACTION_STATE_LOG_NUM_PARTITIONS": "4",
        "KAFKA_TRANSACTION_STATE_LOG_REPLICATION_FACTOR": "1",
        "KAFKA_TRANSACTION_STATE_LOG_MIN_ISR": "1",
    }.items():
        kafka.with_env(name, value)
    with ExitStack() as stack:
        stack.enter_context(kafka)
        postgres = stack.enter_context(PostgresContainer("postgres:18", driver=None))
        yield SharedServices("docker", kafka.get_bootstrap_server(), postgres.get_connection_url())


def _execute(dsn: str, statement: str) -> None:
    async def execute() -> None:
        connection = await asyncpg.connect(dsn)
        try:
            await connection.execute(statement)
        finally:
            await connection.close()

    _in_thread(lambda: _run(execute()))


def _run(coroutine: Coroutine[Any, Any, None]) -> None:
    asyncio.run(coroutine)


def _in_thread(work: Callable[[], None]) -> None:
    """Do something that runs its own event loop away from the loop of the tests, so that sync tests can use it too."""
    with ThreadPoolExecutor(1) as executor:
        executor.submit(work).result()
