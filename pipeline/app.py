"""One Faust app for each role: Faust's agents, group, assignor, tables and web view, on the batch transport.

What Faust would do by itself and must not do here is switched off in this one place: creating topics and folders,
its own producer, its own table recovery (a lane restores its partition), and reading settings from bare names in
the environment.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Iterable
from typing import Any, ClassVar, Final, NamedTuple, cast

import faust
from aiohttp.web import BaseSite, SockSite
from aiokafka.coordinator.protocol import ConsumerProtocolMemberAssignment
from aiokafka.errors import (
    GroupAuthorizationFailedError,
    InconsistentGroupProtocolError,
    InvalidGroupIdError,
    InvalidSessionTimeoutError,
)
from faust.app.base import BootStrategy
from faust.app.router import Router
from faust.assignor.client_assignment import ClientMetadata
from faust.assignor.partition_assignor import PartitionAssignor
from faust.tables.manager import TableManager
from faust.tables.recovery import RebalanceAgain, Recovery, ServiceStopped
from faust.transport.drivers import TRANSPORTS
from faust.types import TP
from faust.web.drivers.aiohttp import Web
from mode import Service
from yarl import URL

from pipeline.errors import ServiceUnavailable, StamplineError
from pipeline.kafka import FencedInstanceId, partition_for
from pipeline.lanes import Follower, Role
from pipeline.logs import get_logger
from pipeline.settings import Settings
from pipeline.topics import topic_name
from pipeline.transport import BatchConsumer, BatchSchema

TRANSPORTS.aliases["batch"] = "pipeline.transport:Transport"

#: Where the web views of nodes begin to look for a free port.
_WEB_PORT: Final = 6066

#: What Kafka answers a member that it will not take, however often it asks.
_OUT_OF_GROUP: Final = (
    GroupAuthorizationFailedError,
    InconsistentGroupProtocolError,
    InvalidGroupIdError,
    InvalidSessionTimeoutError,
)

log = get_logger("stampline.app")

#: Faust reads settings from variables with this prefix; nobody sets them.
_ENV_PREFIX: Final = "STAMPLINE_FAUST_"


class LaneRecovery(Recovery):
    """Faust's recovery without a recovery: lanes restore their partitions themselves, one by one."""

    @Service.task
    async def _restart_recovery(self) -> None:
        while not self.should_stop:
            if await self.wait_for_stopped(self.signal_recovery_start.wait()):
                return
            self.signal_recovery_start.clear()
            try:
                await self._wait(self.on_recovery_completed(self._generation_id))
            except RebalanceAgain:
                continue
            except ServiceStopped:
                return

    @Service.task
    async def _slurp_changelogs(self) -> None:
        """Read nothing."""

    @Service.task
    async def _publish_stats(self) -> None:
        """Publish nothing."""


class LaneTableManager(TableManager):
    """Faust's table registry, with a recovery that leaves the work to the lanes."""

    @property
    def recovery(self) -> Recovery:
        """The recovery service."""
        if self._recovery is None:
            self._recovery = LaneRecovery(self.app, self, beacon=self.beacon, loop=self.loop)
        return self._recovery

    async def on_start(self) -> None:
        """Start at once; Faust would sleep for a second."""
        await self._update_channels()
        await self.recovery.start()


class NodeAssignor(PartitionAssignor):
    """Faust's assignor, for a node that may come back under another web address.

    A static member that starts again is given what its former self had, together with that one's address; Faust
    asserts that it gets its own address back, and its coordinator would die of it.
    """

    def on_assignment(self, assignment: Any) -> None:
        """Take over an assignment as if it had been made for this very process."""
        told = ClientMetadata.loads(self._decompress(assignment.user_data))
        former, url = told.url, str(self._url)
        if former != url:
            log.info("assignment_of_former_self", former_url=former, url=url)
            for places in (told.changelog_distribution, told.external_topic_distribution):
                if former in places:
                    places[url] = places.pop(former)
            told.url = url
            assignment = ConsumerProtocolMemberAssignment(
                assignment.version, assignment.assignment, self._compress(told.dumps())
            )
        super().on_assignment(assignment)


class KeyRouter(Router):
    """Finds the node of a key as the producers found its partition; Faust would ask its own producer."""

    def key_store(self, table_name: str, key: Any) -> URL:
        """Return the web address of the node that holds a key."""
        topic = self._get_table_topic(self._get_table(table_name))
        urls = self._assignor._tps_url  # type: ignore[attr-defined]  # noqa: SLF001 - Faust has no public way
        partitions = sum(tp.topic == topic for tp in urls)
        return URL(urls[TP(topic, partition_for(str(key).encode(), max(1, partitions)))])


class SocketWeb(Web):
    """Faust's web view on a socket that is bound already, so that no other process can take its port meanwhile."""

    def _new_transport_tcp(self) -> BaseSite:
        web_socket = cast("RoleApp", self.app).web_socket
        assert web_socket is not None
        return SockSite(self._runner, web_socket)


class WebPlace(NamedTuple):
    """Where a process has its web view, and whether this is the one app of the process that serves it."""

    socket: socket.socket
    serves: bool

    @property
    def port(self) -> int:
        """The port, on loopback."""
        return int(self.socket.getsockname()[1])


class ConsumerOnly(BootStrategy):
    """Starts neither Faust's producer, its leader election nor its reply consumer."""

    enable_kafka_producer = False

    def kafka_consumer(self) -> Iterable[Any]:
        """Return the consumer alone."""
        return [self.app.consumer]


class RoleApp(faust.App):
    """The Faust app of one role in this process."""

    BootStrategy: ClassVar[Any] = ConsumerOnly

    def __init__(
        self, name: str, settings: Settings, role: Role, *, transactions: bool, web: WebPlace | None = None
    ) -> None:
        self.web_socket = web.socket if web is not None and web.serves else None
        web_port = web.port if web is not None else _WEB_PORT
        # The name stands where a user's would: the same loopback address is another node on another host, and later.
        node = f"{node_name()}@127.0.0.1:{web_port}" if web is not None else f"{node_name()}:1"
        self.settings = settings
        self.role = role
        self.transactions = transactions
        session_seconds = settings.kafka_session_timeout_ms / 1000
        super().__init__(
            topic_name(settings, name),
            env_prefix=_ENV_PREFIX,
            broker=f"batch://{settings.kafka_bootstrap_servers.split(',')[0]}",
            TableManager=LaneTableManager,
            PartitionAssignor=NodeAssignor,
            Router=KeyRouter,
            broker_session_timeout=session_seconds,
            broker_heartbeat_interval=session_seconds / 4,
            broker_request_timeout=settings.kafka_request_timeout_ms / 1000,
            stream_wait_empty=False,
            stream_recovery_delay=0.0,
            topic_allow_declare=False,
            topic_disable_leader=True,
            topic_partitions=settings.kafka_topic_partitions,
            # Where there is no table, standbys would only make Faust's assignor spread partitions less evenly.
            table_standby_replicas=settings.table_standby_replicas if isinstance(role, Follower) else 0,
            web_enabled=self.web_socket is not None,
            web_bind="127.0.0.1",
            web_host="127.0.0.1",
            web_port=web_port,
            # Faust's assignor asserts that it gets its own url back, so every process needs one of its own. It reaches
            # the group with the member's metadata, where `stampline status` finds the node by it.
            canonical_url=f"http://{node}",
        )

    def release(self) -> None:
        """Close the web view's socket, also where the app never started."""
        if self.web_socket is not None:
            self.web_socket.close()

    def _new_web(self) -> Web:
        return SocketWeb(self)

    async def on_first_start(self) -> None:
        """Make no data folders: nothing of ours is in them."""

    def batches(self, topic: str) -> Any:
        """Return the topic as a channel of `Batch`es; its acks mean nothing."""
        return self.topic(topic_name(self.settings, topic), schema=BatchSchema(), acks=False, internal=False)

    @property
    def batch_consumer(self) -> BatchConsumer:
        """The consumer, as what it is."""
        consumer = self.consumer
        assert isinstance(consumer, BatchConsumer)
        return consumer

    @property
    def is_ready(self) -> bool:
        """Whether the role has joined its group and all partitions that it was given are live."""
        return not self.rebalancing and self.batch_consumer.lanes.ready

    @property
    def reaches_kafka(self) -> bool:
        """Whether the group's coordinator answers, and the group has told which partitions are ours."""
        coordinator = getattr(self.batch_consumer.thread._consumer, "_coordinator", None)  # noqa: SLF001
        return getattr(coordinator, "coordinator_id", None) is not None and self.batch_consumer.lanes.assigned

    def find_fault(self) -> BaseException | None:
        """Return why this role cannot work any more, though its process lives; None while all is well.

        Of these Faust notices none but a crash: an error that keeps it out of its group, a lane or an agent whose task
        has ended, a dead task of the consumer's coordinator.
        """
        fault = self._find_fault_of_group()
        if fault is not None:
            return fault
        if self.crashed:
            return self.crash_reason or StamplineError("it crashed")
        if self.batch_consumer.lanes.ended:
            return StamplineError("the lane of a partition has ended")
        tasks = [actor.actor_task for agent in self.agents.values() for actor in agent._actors]  # noqa: SLF001
        tasks += self.batch_consumer.thread.coordinator_tasks()
        for task in tasks:
            if task is not None and task.done() and not self.should_stop:
                return (not task.cancelled() and task.exception()) or StamplineError("one of its tasks has ended")
        return None

    def _find_fault_of_group(self) -> StamplineError | None:
        """Return why this process cannot be in its group; what may pass is logged and tried again."""
        name = self.settings.kafka_group_instance_id
        error = self.batch_consumer.thread.group_error
        # Whoever asks the consumer for something first gets to hear of the error, and may have crashed of it.
        fenced = any(FencedInstanceId.__name__ in str(told) for told in (error, self.crash_reason))
        if name is not None and (self.batch_consumer.has_namesake or fenced):
            return StamplineError(
                f"another process uses KAFKA_GROUP_INSTANCE_ID={name} too: give each process a name of its own"
            )
        if isinstance(error, _OUT_OF_GROUP):
            return StamplineError(f"Kafka keeps this process out of its group: {error}")
        if error is not None:
            log.warning("group_error", group=self.conf.id, error=str(error))
            self.batch_consumer.thread.join_again()
        return None


def node_name() -> str:
    """Return the name of this process, which no other one of the deployment has at the same time."""
    return f"{socket.gethostname()}-{os.getpid()}"


def bind_web_socket() -> socket.socket:
    """Bind the first free port of loopback from Faust's default on, for a node's web view.

    Raises:
        ServiceUnavailable: there is none.
    """
    for port in range(_WEB_PORT, 2**16):
        web_socket = socket.socket()
        web_socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            web_socket.bind(("127.0.0.1", port))
            web_socket.listen()
        except OSError:
            web_socket.close()
        else:
            return web_socket
    raise ServiceUnavailable(f"no port from {_WEB_PORT} on is free on 127.0.0.1")
