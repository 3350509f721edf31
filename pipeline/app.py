"""One Faust app for each role: Faust's agents, group, assignor, tables and web view, on the batch transport.

What Faust would do by itself and must not do here is switched off in this one place: creating topics and folders,
its own producer, its own table recovery (a lane restores its partition), and reading settings from bare names in
the environment.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Iterable
from typing import Any, ClassVar, Final

import faust
from faust.app.base import BootStrategy
from faust.tables.manager import TableManager
from faust.tables.recovery import RebalanceAgain, Recovery, ServiceStopped
from faust.transport.drivers import TRANSPORTS
from mode import Service

from pipeline.errors import StamplineError
from pipeline.lanes import Role
from pipeline.settings import Settings
from pipeline.topics import topic_name
from pipeline.transport import BatchConsumer, BatchSchema

TRANSPORTS.aliases["batch"] = "pipeline.transport:Transport"

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
        self, name: str, settings: Settings, role: Role, *, transactions: bool, web_port: int | None = None
    ) -> None:
        self.settings = settings
        self.role = role
        self.transactions = transactions
        session_seconds = settings.kafka_session_timeout_ms / 1000
        super().__init__(
            topic_name(settings, name),
            env_prefix=_ENV_PREFIX,
            broker=f"batch://{settings.kafka_bootstrap_servers.split(',')[0]}",
            TableManager=LaneTableManager,
            broker_session_timeout=session_seconds,
            broker_heartbeat_interval=session_seconds / 4,
            broker_request_timeout=settings.kafka_request_timeout_ms / 1000,
            stream_wait_empty=False,
            stream_recovery_delay=0.0,
            topic_allow_declare=False,
            topic_disable_leader=True,
            topic_partitions=settings.kafka_topic_partitions,
            table_standby_replicas=0,
            web_enabled=web_port is not None,
            web_bind="127.0.0.1",
            web_host="127.0.0.1",
            web_port=web_port or 6066,
            # Faust's assignor asserts that it gets its own url back, so every process needs one of its own.
            canonical_url=f"http://127.0.0.1:{web_port}"
            if web_port
            else f"http://{socket.gethostname()}-{os.getpid()}:1",
        )

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

    def find_fault(self) -> BaseException | None:
        """Return why this role cannot work any more, though its process lives; None while all is well.

        Faust notices none but the first of these: a crash, an agent whose task has ended, a dead task of the
        consumer's coordinator.
        """
        if self.crashed:
            return self.crash_reason or StamplineError("it crashed")
        tasks = [actor.actor_task for agent in self.agents.values() for actor in agent._actors]  # noqa: SLF001
        tasks += self.batch_consumer.thread.coordinator_tasks()
        for task in tasks:
            if task is not None and task.done() and not self.should_stop:
                return (not task.cancelled() and task.exception()) or StamplineError("one of its tasks has ended")
        return None
