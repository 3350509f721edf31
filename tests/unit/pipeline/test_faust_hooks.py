"""What stampline overrides or touches inside Faust, mode and aiokafka is still there, and still has its effect.

None of it is promised by their authors, hence the pinned versions: a new one is let in once this module passes with it.
"""

from __future__ import annotations

import asyncio
import importlib
import importlib.metadata
import inspect
from collections.abc import AsyncIterator, Iterator
from typing import Any, cast

import aiokafka.producer.sender
import pytest
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer, TopicPartition
from aiokafka.consumer.fetcher import Fetcher, FetchError
from aiokafka.consumer.group_coordinator import GroupCoordinator
from aiokafka.consumer.subscription_state import SubscriptionState
from aiokafka.producer.message_accumulator import BatchBuilder, MessageAccumulator
from faust.agents.actor import Actor
from faust.agents.agent import Agent
from faust.app.base import App, BootStrategy
from faust.app.router import Router
from faust.assignor.partition_assignor import PartitionAssignor
from faust.stores.base import SerializedStore
from faust.tables.base import Collection
from faust.tables.manager import TableManager
from faust.tables.recovery import Recovery
from faust.transport.consumer import Consumer
from faust.transport.drivers import aiokafka as driver
from faust.types import TP, ConsumerMessage
from faust.web.drivers.aiohttp import Web
from mode import Service
from mode.threads import QueueServiceThread

import pipeline.transactions  # noqa: F401 (it sets the pause between transactions)
from pipeline.app import ConsumerOnly, KeyRouter, LaneRecovery, LaneTableManager, NodeAssignor, RoleApp, SocketWeb
from pipeline.settings import Settings
from pipeline.transport import BatchConsumer, BatchConsumerThread, BatchSchema, Transport
from tables.store import BatchStore, BatchTable

pytestmark = pytest.mark.unit


class IdleRole:
    """A role that is never asked for anything."""

    async def open(self, tp: TP, consumer: Any) -> int:
        """Start at the beginning."""
        return 0

    async def close(self, tp: TP) -> None:
        """Do nothing."""

    def retain(self, tps: Any) -> None:
        """Do nothing."""


@pytest.fixture
def app() -> Iterator[RoleApp]:
    """A role's app as in a node, but not started."""
    app = RoleApp("hooks", Settings(), IdleRole(), transactions=True)
    yield app
    # The thread makes its loop before it is started, and closes it when it ends: here it never begins.
    app.batch_consumer.thread.thread_loop.close()


@pytest.fixture
async def fetcher(app: RoleApp) -> AsyncIterator[Fetcher]:
    """A fetcher of aiokafka's, without a broker."""
    subscription = SubscriptionState()
    subscription.subscribe(topics={"t"})
    subscription.assign_from_subscribed({TopicPartition("t", 0), TopicPartition("t", 1)})
    fetcher = Fetcher(aiokafka.AIOKafkaClient(), subscription)
    yield fetcher
    await fetcher.close()


@pytest.mark.parametrize(
    ("distribution", "series"), [("faust-streaming", "0.15."), ("aiokafka", "0.14."), ("mode-streaming", "0.")]
)
def test_the_versions_are_those_that_were_read(distribution: str, series: str) -> None:
    """A version outside the pinned range may have other insides."""
    assert importlib.metadata.version(distribution).startswith(series)


OURS = [
    RoleApp, ConsumerOnly, LaneRecovery, LaneTableManager, KeyRouter, NodeAssignor, SocketWeb,
    BatchConsumer, BatchConsumerThread, BatchSchema, Transport, BatchStore, BatchTable,
]  # fmt: skip
#: What these classes have beside what they override.
ADDED = {
    "BatchConsumer": {
        "thread", "_fetch", "deliver", "log_range", "commit_offsets", "start_at", "has_namesake", "reaches",
    },
    "BatchConsumerThread": {
        "batch_app", "commit_offsets", "log_range", "_log_range", "coordinator_tasks", "wake", "_wake",
        "group_error", "join_again", "_join_again",
        "start_at", "_start_at", "fetch", "_fetch", "reaches", "_reaches",
    },
    "BatchStore": {"partition", "retain", "_answering"},
    "BatchTable": {"batch_store"},
    "RoleApp": {
        "batches", "batch_consumer", "is_ready", "reaches_kafka", "find_fault", "_find_fault_of_group", "release",
    },
}  # fmt: skip


def _overrides(ours: type) -> list[tuple[str, Any]]:
    """Return the methods and properties of a class that are meant to replace a library's."""
    return [
        (name, value)
        for name, value in vars(ours).items()
        if (callable(getattr(value, "fun", value)) or isinstance(value, property))
        and not inspect.isclass(value)
        and not (name.startswith("__") and name not in {"__init__", "__post_init__"})
        and name not in ADDED.get(ours.__name__, set())
    ]


@pytest.mark.parametrize("ours", OURS, ids=lambda ours: ours.__name__)
def test_what_is_overridden_exists(ours: type) -> None:
    """An override of nothing would never be called; it takes what its caller gives, and is awaited if the other is."""
    [base, *_] = ours.__bases__
    for name, value in _overrides(ours):
        assert hasattr(base, name), f"{base.__name__} has no {name}: {ours.__name__} overrides nothing"
        if isinstance(value, property) or name == "__init__":
            continue
        theirs, mine = getattr(base, name), getattr(ours, name)
        theirs, mine = getattr(theirs, "fun", theirs), getattr(mine, "fun", mine)
        assert inspect.iscoroutinefunction(mine) == inspect.iscoroutinefunction(theirs), name
        their_parameters = inspect.signature(theirs).parameters.values()
        positional = [
            item for item in their_parameters if item.kind in {item.POSITIONAL_ONLY, item.POSITIONAL_OR_KEYWORD}
        ]
        by_name = {item.name: None for item in their_parameters if item.kind is item.KEYWORD_ONLY}
        inspect.signature(mine).bind(*positional, **by_name)


def test_every_name_that_is_ours_alone_is_free() -> None:
    """What the libraries may come to call by the same name would be overridden by accident."""
    taken = {
        f"{ours.__name__}.{name}"
        for ours in OURS
        for name in ADDED.get(ours.__name__, set())
        if any(hasattr(base, name) for base in ours.__bases__)
    }
    assert not taken


@pytest.mark.parametrize(
    ("owner", "name", "parameters"),
    [
        (driver.AIOKafkaConsumerThread, "_ensure_consumer", []),
        (driver.AIOKafkaConsumerThread, "_create_worker_consumer", ["transport"]),
        (driver.AIOKafkaConsumerThread, "_fetch_records", ["consumer", "active_partitions", "timeout", "max_records"]),
        (QueueServiceThread, "call_thread", ["fun", "args", "kwargs"]),
        (Consumer, "stop_flow", []),
        (Consumer, "resume_flow", []),
        (Consumer, "_is_changelog_tp", ["tp"]),
        (Consumer, "on_partitions_assigned", ["assigned", "generation_id"]),
        (Consumer, "on_partitions_revoked", ["revoked"]),
        (App, "create_event", ["key", "value", "headers", "message"]),
        (PartitionAssignor, "assigned_standbys", []),
        (Recovery, "on_recovery_completed", ["generation_id"]),
        (Recovery, "_wait", ["coro", "timeout"]),
        (TableManager, "_update_channels", []),
        (Collection, "_new_store", []),
        (Router, "_get_table", ["name"]),
        (Router, "_get_table_topic", ["table"]),
        (Service, "wait", ["coros", "timeout"]),
        (Service, "wait_for_stopped", ["coros", "timeout"]),
        (Fetcher, "fetched_records", ["partitions", "timeout", "max_records"]),
        (Fetcher, "_notify", ["future"]),
        (AIOKafkaConsumer, "seek", ["partition", "offset"]),
        (AIOKafkaConsumer, "commit", ["offsets"]),
        (AIOKafkaConsumer, "last_stable_offset", ["partition"]),
        (AIOKafkaProducer, "create_batch", []),
        (AIOKafkaProducer, "send_batch", ["batch", "topic", "partition"]),
        (AIOKafkaProducer, "begin_transaction", []),
        (AIOKafkaProducer, "send_offsets_to_transaction", ["offsets", "group_id"]),
        (AIOKafkaProducer, "commit_transaction", []),
        (AIOKafkaProducer, "abort_transaction", []),
        (BatchBuilder, "append", ["timestamp", "key", "value", "headers"]),
        (aiokafka.producer.sender.Sender, "close", []),
        (MessageAccumulator, "fail_all", ["exception"]),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)  # fmt: skip
def test_what_is_called_exists(owner: type, name: str, parameters: list[str]) -> None:
    """Each with the parameters that are passed to it."""
    assert [item for item in inspect.signature(getattr(owner, name)).parameters if item != "self"] == parameters


async def test_the_apps_parts_are_ours(app: RoleApp) -> None:
    """Faust finds the transport by its alias, and tables, router, web view and boot strategy in the app."""
    consumer = app.batch_consumer

    assert type(app.transport) is Transport
    assert type(consumer.thread) is BatchConsumerThread
    assert type(app.tables) is LaneTableManager
    assert type(cast("TableManager", app.tables).recovery) is LaneRecovery
    assert type(app.router) is KeyRouter
    assert type(app.web) is SocketWeb
    assert type(app.boot_strategy) is ConsumerOnly
    assert list(app.boot_strategy.kafka_producer()) == []
    assert list(app.boot_strategy.kafka_consumer()) == [consumer]
    assert consumer.thread.batch_app is app
    assert consumer.thread._starts == {}  # __post_init__ has run
    assert callable(consumer.callback)
    assert isinstance(consumer.can_resume_flow, asyncio.Event)
    assert (consumer.flow_active, app.consumer_generation_id, app.crashed, app.rebalancing) == (True, 0, False, False)
    assert app.crash_reason is None
    assert BootStrategy.enable_kafka_producer is not False


async def test_faust_recovers_nothing_by_itself(app: RoleApp) -> None:
    """The tasks of its recovery are replaced by ours, not run beside them."""
    recovery: Any = cast("TableManager", app.tables).recovery
    tasks: list[Any] = list(recovery._get_tasks())

    assert {task.fun.__qualname__ for task in tasks} == {
        "LaneRecovery._restart_recovery",
        "LaneRecovery._slurp_changelogs",
        "LaneRecovery._publish_stats",
    }
    assert [hasattr(recovery, name) for name in ("signal_recovery_start", "_generation_id")] == [True, True]
    assert "self._recovery" in inspect.getsource(TableManager)


async def test_commits_and_seeks_of_faust_do_nothing(app: RoleApp) -> None:
    """Its timer, its revoke path and its recovery come to our methods."""
    assert await app.batch_consumer.commit() is False
    assert await app.batch_consumer.force_commit() is False
    await app.batch_consumer.perform_seek()
    app.batch_consumer.verify_event_path(0.0, TP("t", 0))


async def test_a_batch_goes_through_a_stream_as_it_is(app: RoleApp) -> None:
    """The schema makes an event of the message without looking at the batch, and the channel uses that schema."""
    batch: Any = object()
    message = ConsumerMessage("t", 0, 5, 1.0, 0, [], None, batch, None, tp=TP("t", 0), generation_id=3)
    decode = app.batches("file-events").schema.compile(app)

    event = await decode(message, propagate=False)

    assert event.value is batch
    assert event.message is message
    assert (message.generation_id, message.tp) == (3, TP("t", 0))


async def test_agents_have_tasks_that_can_be_watched(app: RoleApp) -> None:
    """`find_fault` looks at them; Faust itself would not notice that one has ended."""

    @app.agent(app.batches("file-events"), name="hooks")
    async def run(batches: Any) -> None:
        async for batch in batches:
            batch.start(None)

    assert isinstance(run, Agent)
    assert list(run._actors) == []
    assert "self.actor_task = " in inspect.getsource(Actor)
    assert "_actors" in inspect.getsource(Agent)


async def test_the_consumer_is_of_our_own_making(app: RoleApp) -> None:
    """Its options are ours, and what is touched inside it is there."""
    consumer = app.batch_consumer.thread._create_worker_consumer(app.transport)
    try:
        assert (consumer._isolation_level, consumer._auto_offset_reset) == ("read_committed", "none")
        assert consumer._enable_auto_commit is False
        assert (consumer._fetcher, consumer._coordinator, consumer._closed) == (None, None, False)
    finally:
        await consumer.stop()
    assert app.batch_consumer.thread.coordinator_tasks() == []
    assert app.batch_consumer.thread.group_error is None
    source = inspect.getsource(GroupCoordinator)
    assert "self._coordination_task = create_task(" in source
    assert "self._pending_exception = exc" in source


class _Poll:
    """Partitions as aiokafka's fetcher gets them: only `in` may be asked, as lanes change while it looks."""

    def __init__(self, *partitions: TopicPartition) -> None:
        self.partitions = set(partitions)

    def __contains__(self, partition: object) -> bool:
        return partition in self.partitions


async def test_only_partitions_with_room_are_fetched(fetcher: Fetcher) -> None:
    """A collection that knows nothing but `in` is enough; what it does not hold stays for later, and waits."""
    assert (fetcher._prefetch_backoff, fetcher._closed) == (0.1, False)

    fetcher._records = {TopicPartition("t", n): FetchError(error=LookupError(n), backoff=0) for n in (0, 1)}
    assert await fetcher.fetched_records(_Poll(), timeout=0) == {}
    with pytest.raises(LookupError, match="1"):
        await fetcher.fetched_records(_Poll(TopicPartition("t", 1)), timeout=0)
    assert list(fetcher._records) == [TopicPartition("t", 0)]


async def test_a_waiting_fetch_can_be_woken(app: RoleApp, fetcher: Fetcher) -> None:
    """`wake` notifies every waiter, so that a fetch looks again which lanes have room."""
    waiting = asyncio.create_task(fetcher.fetched_records(_Poll(), timeout=60))
    while not fetcher._fetch_waiters:  # noqa: ASYNC110 (aiokafka has no event for it)
        await asyncio.sleep(0)
    [before] = fetcher._fetch_waiters
    app.batch_consumer.thread._consumer = type("Consumer", (), {"_fetcher": fetcher})()

    app.batch_consumer.thread._wake()

    assert before.done()
    while fetcher._fetch_waiters in ({before}, set()):  # noqa: ASYNC110 (the same)
        await asyncio.sleep(0)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    app.batch_consumer.thread._consumer = None


async def test_aiokafka_knows_how_far_a_partition_is_fetched(app: RoleApp, fetcher: Fetcher) -> None:
    """Position, last stable offset and the time of the answer are there for the partitions that a fetch told of."""
    told, untold, foreign = TP("t", 0), TP("t", 1), TP("t", 7)
    subscription = fetcher._subscriptions
    thread = app.batch_consumer.thread
    thread._consumer = type("Consumer", (), {"_subscription": subscription})()
    for tp in (told, untold):
        assert subscription.subscription.assignment.state_value(tp).lso is None
        subscription.seek(tp, 5)
    state = subscription.subscription.assignment.state_value(told)
    state.lso, state.timestamp = 8, 0
    found = await thread._reaches([told, untold, foreign])

    assert found.keys() == {told}
    assert found[told][:3] == (5, None, 8)
    assert found[told].age_seconds > 1e9


def test_the_pause_between_transactions_is_ours() -> None:
    """The driver reads it from its module each time it waits."""
    assert aiokafka.producer.sender.BACKOFF_OVERRIDE == 0.005
    assert "return BACKOFF_OVERRIDE" in inspect.getsource(aiokafka.producer.sender)


async def test_a_full_record_batch_says_so() -> None:
    """The writer cuts its output where `append` answers None, and headers may be null."""
    producer = AIOKafkaProducer(max_batch_size=1000)
    batch = producer.create_batch()
    assert batch.append(timestamp=None, key=None, value=b"x", headers=[("h", b"v"), ("null", None)]) is not None
    assert batch.append(timestamp=None, key=b"k", value=b"x" * 1000, headers=[]) is None
    assert hasattr(producer, "_sender")
    assert hasattr(producer, "_message_accumulator")
    await producer.stop()


def test_a_store_leaves_no_method_to_faust() -> None:
    """Every abstract way into a store is ours, so that none can write past the reducer."""
    theirs = {name for name, value in vars(SerializedStore).items() if getattr(value, "__isabstractmethod__", False)}
    assert theirs
    assert theirs <= vars(BatchStore).keys()


def test_the_web_view_and_the_router_have_their_parts() -> None:
    """Private attributes that are read: the web's runner, the assignor behind a router, the urls of its partitions."""
    assert "self._runner" in inspect.getsource(Web)
    assert "self._assignor" in inspect.getsource(Router)
    assert "self._tps_url" in inspect.getsource(PartitionAssignor)


def test_both_stream_iterators_exist() -> None:
    """It does not matter whether Faust's stream iterator is compiled.

    The two differ in how they acknowledge events of an old generation (the Python one acks them unseen). Our topics
    have no acks, Faust's commit commits nothing, and a lane waits for the work itself, so nothing is lost either way.
    """
    streams = importlib.import_module("faust.streams")
    assert hasattr(streams, "_CStreamIterator")
    assert hasattr(streams.Stream, "_py_aiter")
    assert hasattr(streams.Stream, "_c_aiter")
