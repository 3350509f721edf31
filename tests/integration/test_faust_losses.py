"""The ways in which stock Faust 0.15 loses data, and for each the test here that shows that it cannot happen.

Faust commits by counting acknowledged messages. Here nothing is acknowledged: a lane has one batch in flight, `process`
commits what it has done, and Faust's own commit commits nothing. Row by row (file and line are Faust's):

== ============================================================ =======================================================
#  what Faust does                                              shown by
== ============================================================ =======================================================
1  a message in flight exactly at the committed offset is       `test_nothing_is_committed_past_a_batch_in_flight[3]`
   skipped by the commit of later ones (consumer.py:1136)
2  the same, worse, where nothing or 0 was ever committed       the same `[None]`, `[0]`
   (consumer.py:1138)
3  after a gap (a transaction's marker makes one) the next      `test_gaps_in_offsets_skip_nothing`
   message counts as done before it is (consumer.py:1157)
4  a commit that failed is believed, and not tried again        `test_a_commit_that_failed_is_not_believed`
   until there is more (consumer.py:1080)
5  any end of the loop's body acknowledges: an exception, a     `test_work_that_does_not_end_well_comes_again`,
   cancellation, a stop (streams.py:1185)                       `test_work_that_is_cut_off_by_a_stop_comes_again`
6  without the compiled iterator, messages of an old            `test_what_a_stream_skips_comes_again`, both iterators
   generation are acknowledged unseen (streams.py:1285)
7  the flush before a commit gives up when nothing is           `test_offsets_wait_for_outputs`
   delivered for 0.1 s, and offsets go first (producer.py:78)
8  a changelog record that was refused is a warning, and its    `test_outputs_that_are_refused_hold_the_offsets`
   offset commits (topics.py:463)
9  a threaded producer is not flushed (producer.py:43)          `test_faust_has_no_producer`: it starts none
10 one request may hold a commit for 1,200 s (settings.py:1424) `test_a_broker_that_does_not_answer_is_bounded`
== ============================================================ =======================================================

`take()`, rows 11 to 14, is not used (`test_no_agent_takes`). Of the tables, rows 20 to 28: a double count after a crash
(20), a store ahead of its changelog (21) or with a wrong position (22) are seen by tests/chaos/test_crash_points.py
and test_recovery.py; the latter also shows that a poisoned changelog stops its partition (23). A lane restores its own
partition (24) and readiness is the lanes' (25, `test_faust_recovers_nothing_by_itself`); values are records, never
empty (26); what went to others is forgotten (27, `test_only_the_partitions_that_stay_are_kept`); Faust's own standbys
are off (28, `test_faust_leaves_recovery_and_standbys_alone`).
"""

from __future__ import annotations

import ast
import asyncio
import inspect
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from types import ModuleType
from typing import Any, NamedTuple

import faust.streams
import pytest
from aiokafka import AIOKafkaConsumer, TopicPartition
from aiokafka.admin.config_resource import ConfigResource, ConfigResourceType
from aiokafka.consumer.group_coordinator import CoordinatorGroupRebalance
from aiokafka.errors import GroupAuthorizationFailedError, KafkaError, RequestTimedOutError
from aiokafka.producer.sender import Sender
from faust.types import ConsumerMessage

from agents import hasher, projector, reducer
from pipeline import transport
from pipeline.errors import StamplineError
from pipeline.kafka import FencedInstanceId, kafka_options
from pipeline.lanes import Batch
from pipeline.logreader import LogReader
from pipeline.topics import FILE_EVENTS, FILE_STAMPS, FILES_CHANGELOG, TOPICS, admin_client, topic_name
from pipeline.transactions import Writer
from pipeline.worker import run_node
from tests.fix_services import MakeSettings
from tests.lane_fakes import until
from tests.probe_node import PROBE_ID, Ground, Probe, open_ground

pytestmark = pytest.mark.integration

MakeGround = Callable[..., Awaitable[Ground]]


@pytest.fixture
async def make_ground(make_settings: MakeSettings) -> AsyncIterator[MakeGround]:
    """Makes two partitions, once in a test, and looks at the commits of a role: the probe, or another."""
    async with AsyncExitStack() as stack:

        async def make(app_id: str = PROBE_ID, source: str = FILE_EVENTS) -> Ground:
            settings = make_settings(
                kafka_topic_partitions=2, batch_records_max=2, revoke_timeout_ms=200, kafka_session_timeout_ms=1000
            )
            return await stack.enter_async_context(open_ground(settings, app_id, source))

        yield make


class Gate:
    """Holds the first batch of partition 0 until it is opened."""

    def __init__(self) -> None:
        self.reached = asyncio.Event()
        self.open = asyncio.Event()

    async def __call__(self, batch: Batch) -> None:
        """Hold a batch."""
        if batch.tp.partition == 0:
            self.reached.set()
            await self.open.wait()


@pytest.mark.parametrize("committed", [None, 0, 3])
async def test_nothing_is_committed_past_a_batch_in_flight(make_ground: MakeGround, committed: int | None) -> None:
    """While the first batch is in flight nothing after it is begun, and the committed offset stays where it was."""
    ground = await make_ground()
    offsets = await ground.send(0, 5)
    if committed is not None:
        await ground.commit(0, committed)
    probe = Probe()
    probe.before = gate = Gate()
    async with ground.running(probe):
        await gate.reached.wait()
        offsets += await ground.send(0, 5)
        others = await ground.send(1, 7)
        await ground.until_committed(1, others[-1] + 1)

        assert (await ground.committed(0), probe.begun[0]) == (committed, 1)
        gate.open.set()
        await ground.until_committed(0, offsets[-1] + 1)

    assert probe.taken == {0: offsets[committed or 0 :], 1: others}


async def test_gaps_in_offsets_skip_nothing(make_ground: MakeGround) -> None:
    """Markers and aborted records are gaps in the offsets: each record comes once, and each commit is what is done."""
    ground = await make_ground()
    commits = []

    async def note(batch: Batch) -> None:
        commits.append((await ground.committed(0), [record.offset for record in batch.records]))

    probe = Probe()
    probe.before = note
    async with ground.running(probe):
        offsets = await ground.send_in_transactions(0, 3, -2, 1, 1, -4, -1, 5, -1)
        await ground.until_committed(0, offsets[-1] + 1)
    async with ground.running(probe):
        offsets += await ground.send_in_transactions(0, -1, 2)
        await ground.until_committed(0, offsets[-1] + 1)

    assert probe.taken[0] == offsets
    assert [offset for _, batch in commits for offset in batch] == offsets
    ends = [None, *(batch[-1] + 1 for _, batch in commits)]
    assert [before for before, _ in commits] == ends[:-1]


@pytest.mark.parametrize("answer", [KafkaError("UnknownError()"), RequestTimedOutError()], ids=["unknown", "known"])
async def test_an_unexpected_answer_to_a_join_is_not_the_end(
    make_ground: MakeGround, monkeypatch: pytest.MonkeyPatch, answer: KafkaError
) -> None:
    """Aiokafka waits for somebody to look at such an error, which Faust never does: the node joins again."""
    ground = await make_ground()
    join = CoordinatorGroupRebalance.perform_group_join
    answers = iter([answer])

    async def join_at_last(rebalance: CoordinatorGroupRebalance) -> Any:
        for error in answers:
            raise error
        return await join(rebalance)

    monkeypatch.setattr(CoordinatorGroupRebalance, "perform_group_join", join_at_last)
    async with run_node(ground.settings, ["hasher"], transactions=True) as node:
        await node.wait_until_ready()


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (KafkaError(repr(FencedInstanceId())), "another process uses KAFKA_GROUP_INSTANCE_ID=mine too"),
        (GroupAuthorizationFailedError("probe"), "keeps this process out of its group"),
    ],
    ids=["fenced", "forbidden"],
)
async def test_an_answer_that_is_the_end_is_told(
    make_ground: MakeGround, monkeypatch: pytest.MonkeyPatch, answer: KafkaError, said: str
) -> None:
    """Where trying again cannot help, the node ends with a line that says why."""
    ground = await make_ground()
    settings = ground.settings.model_copy(update={"kafka_group_instance_id": "mine"})

    async def refuse(_rebalance: CoordinatorGroupRebalance) -> Any:
        raise answer

    monkeypatch.setattr(CoordinatorGroupRebalance, "perform_group_join", refuse)
    with pytest.raises(StamplineError, match=said):
        async with run_node(settings, ["hasher"], transactions=True):
            pytest.fail("it has started")


async def test_a_commit_that_failed_is_not_believed(make_ground: MakeGround, monkeypatch: pytest.MonkeyPatch) -> None:
    """The lane asks the broker where it is and does the batch again, without waiting for more to come."""
    ground = await make_ground()
    commit = AIOKafkaConsumer.commit
    answers = iter([RequestTimedOutError(), RequestTimedOutError()])

    async def commit_at_last(consumer: AIOKafkaConsumer, offsets: Any) -> None:
        for error in answers:
            raise error
        await commit(consumer, offsets)

    monkeypatch.setattr(AIOKafkaConsumer, "commit", commit_at_last)
    offsets = await ground.send(0, 1)
    probe = Probe()
    async with ground.running(probe):
        await ground.until_committed(0, offsets[-1] + 1)

    assert (probe.begun[0], probe.opened[0], probe.taken[0]) == (3, 3, offsets)


@pytest.mark.parametrize("error", [RuntimeError("a bug"), asyncio.CancelledError()], ids=["raises", "is cancelled"])
async def test_work_that_does_not_end_well_comes_again(make_ground: MakeGround, error: BaseException) -> None:
    """What raises, or is cancelled from inside, commits nothing; the same records come again, and then later ones."""
    ground = await make_ground()
    seen = []

    async def fail_twice(batch: Batch) -> None:
        seen.append((await ground.committed(0), batch.records[0].offset))
        if len(seen) <= 2:
            raise error

    offsets = await ground.send(0, 4)
    probe = Probe()
    probe.before = fail_twice
    async with ground.running(probe):
        await ground.until_committed(0, offsets[-1] + 1)

    assert seen == [(None, 0), (None, 0), (None, 0), (2, 2)]
    assert probe.taken[0] == offsets


async def test_work_that_is_cut_off_by_a_stop_comes_again(make_ground: MakeGround) -> None:
    """A stop cancels what does not end in its time; nothing is committed, and the next node begins with it."""
    ground = await make_ground()
    offsets = await ground.send(0, 4)
    first, second = Probe(), Probe()
    first.before = gate = Gate()
    async with ground.running(first):
        await gate.reached.wait()

    assert (await ground.committed(0), first.taken[0]) == (None, [])
    async with ground.running(second):
        await ground.until_committed(0, offsets[-1] + 1)
    assert second.taken[0] == offsets


@pytest.mark.parametrize("iterator", ["compiled", "in Python"])
async def test_what_a_stream_skips_comes_again(
    make_ground: MakeGround, monkeypatch: pytest.MonkeyPatch, iterator: str
) -> None:
    """A batch of an old generation, which a stream drops without a word, is not done: after the rebalance it comes."""
    streams: Any = faust.streams
    assert streams._CStreamIterator is not None
    if iterator == "in Python":
        monkeypatch.setattr(streams, "_CStreamIterator", None)
    ground = await make_ground()
    make_message = ConsumerMessage
    stale: list[int] = []

    def make_stale(topic: str, partition: int, *arguments: Any, **options: Any) -> Any:
        if partition == 0 and not stale:
            options["generation_id"] -= 1
            stale.append(options["generation_id"])
        return make_message(topic, partition, *arguments, **options)

    monkeypatch.setattr(transport, "ConsumerMessage", make_stale)
    first, second = Probe(), Probe()
    async with ground.running(first):
        offsets = await ground.send(0, 4)
        await until(lambda: stale)
        others = await ground.send(1, 2)
        await ground.until_committed(1, others[-1] + 1)
        assert (await ground.committed(0), first.begun[0]) == (None, 0)

        async with ground.running(second):
            await ground.until_committed(0, offsets[-1] + 1)

    assert sorted(first.taken[0] + second.taken[0]) == offsets


class Hop(NamedTuple):
    """A hop that writes to Kafka: what to run, its group, its input, and the output whose delivery is disturbed."""

    roles: Sequence[str]
    app_id: str
    source: str
    output: str


HASHER = Hop(["hasher"], hasher.APP_ID, FILE_EVENTS, FILE_STAMPS)
REDUCER = Hop(["hasher", "reducer"], reducer.APP_ID, FILE_STAMPS, FILES_CHANGELOG)
both_hops = pytest.mark.parametrize("hop", [HASHER, REDUCER], ids=["hasher", "reducer"])


@asynccontextmanager
async def holding(monkeypatch: pytest.MonkeyPatch, ground: Ground, hop: Hop) -> AsyncIterator[Gate]:
    """Hold back what is sent to partition 0 of the hop's output, before a byte of it has left."""
    gate = Gate()
    send = Sender._send_produce_req

    async def send_later(sender: Sender, node_id: int, batches: dict[TopicPartition, Any]) -> None:
        if TopicPartition(topic_name(ground.settings, hop.output), 0) in batches:
            gate.reached.set()
            await gate.open.wait()
        await send(sender, node_id, batches)

    monkeypatch.setattr(Sender, "_send_produce_req", send_later)
    try:
        yield gate
    finally:
        gate.open.set()


async def count_stamps(ground: Ground, partition: int) -> int:
    """Return how many stamps were written to a partition."""
    async with LogReader(ground.settings, topic_name(ground.settings, FILE_STAMPS), partition) as reader:
        return sum([len(records) async for records in reader.read(0)])


@both_hops
async def test_offsets_wait_for_outputs(make_ground: MakeGround, monkeypatch: pytest.MonkeyPatch, hop: Hop) -> None:
    """As long as outputs have not left, their inputs are not committed; other partitions do not wait for them."""
    ground = await make_ground(hop.app_id, hop.source)
    await ground.send(0, 2)
    async with (
        holding(monkeypatch, ground, hop) as gate,
        run_node(ground.settings, hop.roles, transactions=True),
    ):
        await gate.reached.wait()
        await ground.send(1, 3)
        await ground.until_committed(1, 3)
        assert await ground.committed(0) is None

        gate.open.set()
        await ground.until_committed(0, 2)

    assert [await count_stamps(ground, partition) for partition in (0, 1)] == [2, 3]


@both_hops
async def test_outputs_that_are_refused_hold_the_offsets(
    make_ground: MakeGround, monkeypatch: pytest.MonkeyPatch, hop: Hop
) -> None:
    """A broker that takes no output gets the batch again and again; its inputs are committed once it has been taken."""
    ground = await make_ground(hop.app_id, hop.source)
    [spec] = [spec for spec in TOPICS if spec.name == hop.output]
    refused = Counter[int]()
    write = Writer.write

    async def count_and_write(writer: Writer, outputs: Any, offsets: Any) -> dict[str, int]:
        try:
            return await write(writer, outputs, offsets)
        except StamplineError:
            refused[writer._partition] += 1
            raise

    async def set_limit(configs: dict[str, str]) -> None:
        topic = ConfigResource(ConfigResourceType.TOPIC, topic_name(ground.settings, hop.output), configs)
        async with admin_client(ground.settings) as client:
            await client.alter_configs([topic])

    monkeypatch.setattr(Writer, "write", count_and_write)
    await set_limit({**spec.configs, "max.message.bytes": "100"})
    await ground.send(0, 2)
    async with run_node(ground.settings, hop.roles, transactions=True):
        await until(lambda: refused[0] >= 3)
        assert await ground.committed(0) is None

        await set_limit(dict(spec.configs))
        await ground.until_committed(0, 2)

    assert await count_stamps(ground, 0) == 2


async def test_faust_has_no_producer(make_ground: MakeGround) -> None:
    """There is none to be flushed or not: its own is never started, and one in a thread is not made."""
    ground = await make_ground()
    offsets = await ground.send(0, 2)
    async with ground.running(Probe()) as app:
        await ground.until_committed(0, offsets[-1] + 1)

        assert app.producer.started is False
        assert app.conf.producer_threaded is False


async def test_a_broker_that_does_not_answer_is_bounded(
    make_ground: MakeGround, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A delivery that never comes holds up no stop and commits nothing; each request has the bound of the settings."""
    ground = await make_ground(hasher.APP_ID)
    await ground.send(0, 2)
    async with holding(monkeypatch, ground, HASHER) as gate:
        async with run_node(ground.settings, ["hasher"], transactions=True):
            await gate.reached.wait()

        assert await ground.committed(0) is None
        gate.open.set()
        async with run_node(ground.settings, ["hasher"], transactions=True):
            await ground.until_committed(0, 2)

    options = kafka_options(ground.settings)
    assert options["request_timeout_ms"] == ground.settings.kafka_request_timeout_ms == 20_000


@pytest.mark.parametrize("agent", [hasher, reducer, projector], ids=lambda module: module.__name__)
def test_no_agent_takes(agent: ModuleType) -> None:
    """Agents iterate over batches, one event each; `take` and its like would acknowledge what has failed."""
    names = {node.attr for node in ast.walk(ast.parse(inspect.getsource(agent))) if isinstance(node, ast.Attribute)}
    assert not names & {"take", "noack_take", "take_events"}
