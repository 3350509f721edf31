"""One Apache Kafka and one PostgreSQL that let nobody in without TLS or a login, and the certificates for both.

Both are started once, when the first test asks for them, whatever TEST_SERVICES says: the servers that the other
tests share speak plainly.
"""

from __future__ import annotations

import asyncio
import platform
import shutil
import sys
import tarfile
import tempfile
import uuid
import zipfile
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal, TypeVar
from urllib.parse import quote

import pytest
import pytest_asyncio

from pipeline.servers.brokers import Kafka, free_port
from pipeline.servers.database import DATABASE, Postgres
from pipeline.servers.server import Server
from pipeline.settings import Settings, load_settings
from tests.fix_road import DEADLINE_SECONDS

if TYPE_CHECKING:
    import trustme

#: Who may log in, at both servers.
USER: Final = "alice"
PASSWORD: Final = "corr3ct-h0rse=battery"

# The keys are Python's words for systems, the values those of the artifacts.
_POSTGRES_SYSTEMS: Final = {
    ("linux", "x86_64"): "linux-amd64",
    ("linux", "aarch64"): "linux-arm64v8",
    ("darwin", "x86_64"): "darwin-amd64",
    ("darwin", "arm64"): "darwin-arm64v8",
}
_POSTGRES_VERSION: Final = "18.0.0"
_MAVEN_PLUGIN: Final = "org.apache.maven.plugins:maven-dependency-plugin:3.8.1"

AnyServer = TypeVar("AnyServer", bound=Server)
Listener = Literal["TLS", "MUTUAL", "ELSEWHERE", "EXPIRED", "RENAMED", "SASL_TLS", "SASL_CLEAR"]
_HERE: Final = "127.0.0.1"
_PROTOCOLS: Final[dict[Listener, str]] = {
    "TLS": "SSL",
    "MUTUAL": "SSL",
    "ELSEWHERE": "SSL",
    "EXPIRED": "SSL",
    "RENAMED": "SSL",
    "SASL_TLS": "SASL_SSL",
    "SASL_CLEAR": "SASL_PLAINTEXT",
}
_MECHANISMS: Final[dict[Listener, tuple[str, ...]]] = {
    "SASL_TLS": ("PLAIN", "SCRAM-SHA-256", "SCRAM-SHA-512"),
    "SASL_CLEAR": ("PLAIN", "SCRAM-SHA-256"),
}
_LOGIN_MODULES: Final = "org.apache.kafka.common.security"


@dataclass(frozen=True)
class Certificate:
    """Files of one certificate: itself with those above it, its private key, and both in one."""

    chain: Path
    key: Path
    both: Path


class Certificates:
    """A CA that our servers and clients trust, and one that nobody does; both made for this run of the tests."""

    def __init__(self, folder: Path) -> None:
        import trustme  # noqa: PLC0415 - it takes a tenth of a second, which every run of the unit tests would pay

        self._folder = folder
        self._ours, self._strange = trustme.CA(), trustme.CA()
        self.ca = folder / "ca.pem"
        self.strange_ca = folder / "strange-ca.pem"
        self._ours.cert_pem.write_to_path(self.ca)
        self._strange.cert_pem.write_to_path(self.strange_ca)
        self.server = self._issue("server", _HERE)
        self.elsewhere = self._issue("elsewhere", "elsewhere.example")
        self.expired = self._issue("expired", _HERE, not_after=datetime.now(UTC) - timedelta(days=1))
        self.client = self._issue("client", f"{USER}@elsewhere.example")
        self.strange = self._issue("strange", _HERE, ca=self._strange)

    def _issue(
        self, name: str, identity: str, *, ca: trustme.CA | None = None, not_after: datetime | None = None
    ) -> Certificate:
        from cryptography.hazmat.primitives.serialization import (  # noqa: PLC0415 - the same
            Encoding,
            NoEncryption,
            PrivateFormat,
            load_pem_private_key,
        )

        made = (ca or self._ours).issue_cert(identity, not_after=not_after)
        # The one form that Kafka reads.
        key = load_pem_private_key(made.private_key_pem.bytes(), password=None).private_bytes(
            Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()
        )
        chain = b"".join(blob.bytes() for blob in made.cert_chain_pems)
        files = Certificate(*(self._folder / f"{name}-{part}.pem" for part in ("chain", "key", "both")))
        files.chain.write_bytes(chain)
        files.key.write_bytes(key)
        files.both.write_bytes(key + chain)
        for path in (files.key, files.both):
            path.chmod(0o600)
        return files


class SecureKafka(Kafka):
    """Apache Kafka with a listener for each way to talk to it; the plain one stays for itself and for probes."""

    def __init__(self, folder: Path, certificates: Certificates) -> None:
        super().__init__(folder, say=_say_nothing)
        self.certificates = certificates
        self._ports = dict(zip(_PROTOCOLS, _free_ports(len(_PROTOCOLS)), strict=True))

    def address_of(self, listener: Listener) -> str:
        """Host and port of a listener."""
        return f"{_HERE}:{self._ports[listener]}"

    def settings_for(self, listener: Listener, mechanism: str = "SCRAM-SHA-512") -> dict[str, Any]:
        """Return the settings of a client that is let in at a listener."""
        settings: dict[str, Any] = {
            "kafka_bootstrap_servers": self.address_of(listener),
            "kafka_security_protocol": _PROTOCOLS[listener],
            "kafka_ssl_ca": self.certificates.ca,
        }
        if listener in _MECHANISMS:
            settings |= {
                "kafka_sasl_mechanism": mechanism,
                "kafka_sasl_username": USER,
                "kafka_sasl_password": PASSWORD,
            }
        if listener == "MUTUAL":
            client = self.certificates.client
            settings |= {"kafka_ssl_cert": client.chain, "kafka_ssl_key": client.key}
        return settings

    def set_password(self, user: str, password: str) -> None:
        """Give a user of SCRAM-SHA-512 a password; connections that are open stay open."""
        from confluent_kafka import admin  # noqa: PLC0415 - one test needs it

        info = admin.ScramCredentialInfo(admin.ScramMechanism.SCRAM_SHA_512, 4096)  # type: ignore[attr-defined]
        change = admin.UserScramCredentialUpsertion(user, info, password.encode())  # type: ignore[attr-defined]
        client = admin.AdminClient({"bootstrap.servers": self.address})
        client.alter_user_scram_credentials([change])[user].result(DEADLINE_SECONDS)

    def _make_format_options(self) -> list[str]:
        words = []
        for mechanism in ("SCRAM-SHA-256", "SCRAM-SHA-512"):
            words += ["--add-scram", f"{mechanism}=[name={USER},password={PASSWORD}]"]
        return words

    def _make_properties(self, state: Path) -> dict[str, object]:
        properties = super()._make_properties(state)
        ours = {name: f"{name}://{self.address_of(name)}" for name in _PROTOCOLS}
        told = ours | {"RENAMED": f"RENAMED://localhost:{self._ports['RENAMED']}"}
        protocols = ",".join(f"{name}:{protocol}" for name, protocol in _PROTOCOLS.items())
        properties["listeners"] = f"{properties['listeners']},{','.join(ours.values())}"
        properties["advertised.listeners"] = f"{properties['advertised.listeners']},{','.join(told.values())}"
        properties["listener.security.protocol.map"] = f"{properties['listener.security.protocol.map']},{protocols}"
        for name, protocol in _PROTOCOLS.items():
            prefix = f"listener.name.{name.lower()}"
            if protocol.endswith("SSL"):
                properties |= {f"{prefix}.{key}": value for key, value in self._tls(name).items()}
            if protocol.startswith("SASL"):
                properties |= {f"{prefix}.{key}": value for key, value in _logins(name).items()}
        return properties

    def _tls(self, listener: Listener) -> dict[str, object]:
        shown = {"ELSEWHERE": self.certificates.elsewhere, "EXPIRED": self.certificates.expired}
        return {
            "ssl.keystore.type": "PEM",
            "ssl.keystore.location": shown.get(listener, self.certificates.server).both,
            "ssl.truststore.type": "PEM",
            "ssl.truststore.location": self.certificates.ca,
            "ssl.client.auth": "required" if listener == "MUTUAL" else "none",
        }


class SecurePostgres(Postgres):
    """PostgreSQL on TCP, that lets `USER` in with the password and over TLS only.

    The wheel's cannot speak TLS, so the programs are those that Java's tests use, from Maven Central.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__(folder, folder / "sockets", say=_say_nothing)
        self._port = free_port()
        self._rules = folder / "rules"

    @property
    def dsn(self) -> str:
        """The connection string of `USER`, which says nothing of TLS."""
        return f"postgresql://{USER}:{quote(PASSWORD, safe='')}@{_HERE}:{self._port}/{DATABASE}"

    def settings_for(self, ca: Path | None) -> dict[str, Any]:
        """Return the settings of a client that is let in and trusts a CA, None = the system's."""
        return {
            "postgres_host": _HERE,
            "postgres_port": self._port,
            "postgres_db": DATABASE,
            "postgres_user": USER,
            "postgres_password": PASSWORD,
            "enable_ssl_database": True,
            "postgres_ssl_ca": ca,
        }

    async def _fetch_programs(self) -> Path:
        system = _POSTGRES_SYSTEMS[sys.platform, platform.machine()]
        artifact = f"io.zonky.test.postgres:embedded-postgres-binaries-{system}:{_POSTGRES_VERSION}"
        place = self.folder / "programs"
        place.mkdir()
        goal = [f"{_MAVEN_PLUGIN}:copy", f"-Dartifact={artifact}", f"-DoutputDirectory={place}"]
        await self._run("mvn", "-q", "-B", *goal, hint=f"{artifact} could not be had; is Maven Central in reach?")
        [jar] = place.glob("*.jar")
        with zipfile.ZipFile(jar) as archive:
            [name] = [name for name in archive.namelist() if name.endswith(".txz")]
            with archive.open(name) as packed, tarfile.open(fileobj=packed, mode="r|xz") as files:
                files.extractall(place, filter="data")
        return place / "bin"

    async def prepare(self) -> None:
        """Write down who may come in."""
        await super().prepare()
        self._rules.write_text(f"local all postgres trust\nhostssl all all {_HERE}/32 scram-sha-256\n")

    def _make_settings(self) -> dict[str, object]:
        ours = {"listen_addresses": _HERE, "hba_file": self._rules, "password_encryption": "scram-sha-256"}
        return super()._make_settings() | ours

    async def start(self) -> None:
        """Start the server and make its users."""
        await super().start()
        await self._execute(f"CREATE ROLE {USER} SUPERUSER LOGIN PASSWORD '{PASSWORD}'")

    async def make_database(self) -> str:
        """Make an empty database and return its name."""
        name = f"stampline_test_{uuid.uuid4().hex[:12]}"
        await self._execute(f'CREATE DATABASE "{name}"')
        return name

    async def show(self, certificate: Certificate | None) -> None:
        """Show a certificate to whoever connects from now on; None = speak no TLS."""
        if certificate is not None:
            for name, source in (("ssl_cert_file", certificate.chain), ("ssl_key_file", certificate.key)):
                # In a folder of its own the server may read it, as its user.
                path = Path(shutil.copy2(source, self._state))
                if self._user:
                    shutil.chown(path, self._user, self._user)
                await self._execute(f"ALTER SYSTEM SET {name} = '{path}'")
        await self._execute(f"ALTER SYSTEM SET ssl = {'off' if certificate is None else 'on'}")
        before = await self._fetch("SELECT pg_conf_load_time()")
        await self._fetch("SELECT pg_reload_conf()")
        # A new process of the server has the settings of its parent; it is the parent that has to hear of them.
        while await self._fetch("SELECT pg_conf_load_time()") == before:  # noqa: ASYNC110 - its parent wakes nobody
            await asyncio.sleep(0.01)

    async def _execute(self, statement: str) -> None:
        connection = await self._connect("postgres")
        try:
            await connection.execute(statement)
        finally:
            await connection.close()

    async def _fetch(self, query: str) -> Any:
        connection = await self._connect("postgres")
        try:
            return await connection.fetchval(query)
        finally:
            await connection.close()


def _logins(listener: Listener) -> dict[str, object]:
    mechanisms = _MECHANISMS[listener]
    modules: dict[str, object] = {
        f"{name.lower()}.sasl.jaas.config": f"{_LOGIN_MODULES}.scram.ScramLoginModule required;" for name in mechanisms
    }
    modules["plain.sasl.jaas.config"] = f'{_LOGIN_MODULES}.plain.PlainLoginModule required user_{USER}="{PASSWORD}";'
    return {"sasl.enabled.mechanisms": ",".join(mechanisms), **modules}


def _free_ports(count: int) -> set[int]:
    ports: set[int] = set()
    while len(ports) < count:
        ports.add(free_port())
    return ports


def _say_nothing(_line: str) -> None:
    """Servers of a test start silently."""


@pytest.fixture(scope="session")
def secure_folder() -> Iterator[Path]:
    """A folder that the system user of PostgreSQL may be let into, which pytest's own are not."""
    folder = Path(tempfile.mkdtemp(prefix="stampline-secure-"))
    folder.chmod(0o711)
    yield folder
    shutil.rmtree(folder)


@pytest.fixture(scope="session")
def certificates(secure_folder: Path) -> Certificates:
    """All certificates, good and bad."""
    return Certificates(secure_folder)


@pytest_asyncio.fixture(scope="session")
async def secure_kafka(secure_folder: Path, certificates: Certificates) -> AsyncIterator[SecureKafka]:
    """Apache Kafka with TLS and logins; ask for it only where there is Java."""
    async with _running(SecureKafka(secure_folder, certificates)) as server:
        yield server


@pytest_asyncio.fixture(scope="session")
async def secure_server(secure_folder: Path) -> AsyncIterator[SecurePostgres]:
    """PostgreSQL with TLS and a password, whatever certificate the last test has left it with."""
    async with _running(SecurePostgres(secure_folder)) as server:
        yield server


@pytest_asyncio.fixture
async def secure_postgres(secure_server: SecurePostgres, certificates: Certificates) -> SecurePostgres:
    """PostgreSQL with TLS, a password and a good certificate."""
    await secure_server.show(certificates.server)
    return secure_server


@pytest.fixture
def make_secure_settings(topic_prefix: str) -> Callable[..., Settings]:
    """Make settings of which nothing comes from the environment and nothing from the shared services."""

    def make(**overrides: Any) -> Settings:
        defaults = {name: field.get_default(call_default_factory=True) for name, field in Settings.model_fields.items()}
        ours = {"kafka_topic_prefix": topic_prefix, "kafka_topic_partitions": 2, "database_pool_min_size": 1}
        return load_settings(**{**defaults, **ours, **overrides})

    return make


@asynccontextmanager
async def _running(server: AnyServer) -> AsyncIterator[AnyServer]:
    try:
        await server.prepare()
        await server.start()
        yield server
    finally:
        await server.stop()
