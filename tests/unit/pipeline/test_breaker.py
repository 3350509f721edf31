"""The circuit breaker: its rules, however calls overlap."""

from __future__ import annotations

import asyncio
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Final

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule
from structlog.testing import capture_logs

from pipeline.breaker import DatabaseCircuitBreaker, State
from pipeline.errors import ServiceUnavailable
from pipeline.settings import Settings

pytestmark = pytest.mark.unit

PLACE: Final = "db.example:5432/stamps"
THRESHOLD: Final = 3
TIMEOUT_SECONDS: Final = 10.0
HALF_OPEN_CALLS: Final = 2

FAILURE: Final = ConnectionResetError("gone\nby accident")
#: What is neither failure nor success: an error in the data, a cancellation.
NEITHER: Final = (ValueError("a value"), asyncio.CancelledError())


class Clock:
    """A clock that a test sets, in s."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        """Tell the time."""
        return self.now


def is_failure(exc: Exception) -> bool:
    """Say what the breaker is to count; it must not even ask about a cancellation."""
    return not isinstance(exc, ValueError)


def make_breaker(clock: Clock) -> DatabaseCircuitBreaker:
    """Make a breaker with small bounds."""
    return DatabaseCircuitBreaker(
        failure_threshold=THRESHOLD,
        recovery_timeout_seconds=TIMEOUT_SECONDS,
        half_open_max_calls=HALF_OPEN_CALLS,
        clock=clock,
    )


def begin(breaker: DatabaseCircuitBreaker) -> AbstractContextManager[None]:
    """Begin a call that a later `end` ends."""
    call = breaker.guard(PLACE, is_failure)
    call.__enter__()
    return call


def end(call: AbstractContextManager[None], outcome: BaseException | None = None) -> None:
    """End a call; what happened in it always reaches the caller."""
    assert not call.__exit__(None if outcome is None else type(outcome), outcome, None)


def run(breaker: DatabaseCircuitBreaker, outcome: BaseException | None = None) -> None:
    """Make one call that ends at once."""
    end(begin(breaker), outcome)


def state(breaker: DatabaseCircuitBreaker) -> State:
    """Return the state, which time alone may change."""
    return breaker.state


@pytest.fixture
def clock() -> Clock:
    """The clock of the breaker."""
    return Clock()


@pytest.fixture
def breaker(clock: Clock) -> DatabaseCircuitBreaker:
    """A closed breaker."""
    return make_breaker(clock)


def open_it(breaker: DatabaseCircuitBreaker) -> None:
    """Fail until it is open."""
    for _ in range(THRESHOLD):
        run(breaker, FAILURE)
    assert state(breaker) == "open"


@dataclass(eq=False)
class Call:
    """A call under way, and the period of the model that it began in."""

    guard: AbstractContextManager[None]
    period: object


class Breaker(RuleBasedStateMachine):
    """Calls that overlap at random, beside a model of the rules."""

    calls: Bundle[Call] = Bundle("calls")

    def __init__(self) -> None:
        super().__init__()
        self.clock = Clock()
        self.breaker = make_breaker(self.clock)
        self.state: State = "closed"
        self.period = object()
        self.opened_at = 0.0
        self.failures = 0
        self.successes = 0
        self.under_way: set[Call] = set()

    def become(self, state: State) -> None:
        """Begin a new period."""
        self.state = state
        self.period = object()
        self.successes = 0
        if state == "open":
            self.opened_at = self.clock.now

    @rule(seconds=st.sampled_from([TIMEOUT_SECONDS / 2, TIMEOUT_SECONDS]))
    def wait(self, seconds: float) -> None:
        """Time goes by."""
        self.clock.now += seconds
        if self.state == "open" and self.clock.now >= self.opened_at + TIMEOUT_SECONDS:
            self.become("half_open")

    @rule(target=calls)
    def begin(self) -> Call:
        """Somebody wants to call, and may if the rules let him."""
        probes = [call for call in self.under_way if call.period is self.period]
        refused = self.state == "open" or (self.state == "half_open" and len(probes) >= HALF_OPEN_CALLS)
        try:
            call = Call(begin(self.breaker), self.period)
        except ServiceUnavailable:
            assert refused
            # One that is over already: to end it does nothing.
            return Call(nullcontext(), None)
        assert not refused
        self.under_way.add(call)
        return call

    @rule()
    def fail(self) -> None:
        """An outage: as many calls fail as open it."""
        if self.state == "closed":
            for _ in range(THRESHOLD - self.failures):
                run(self.breaker, FAILURE)
            self.become("open")
            self.failures = 0

    @rule(call=consumes(calls), outcome=st.sampled_from([None, FAILURE, *NEITHER]))
    def end(self, call: Call, outcome: BaseException | None) -> None:
        """A call ends, at any time after it began."""
        if call not in self.under_way:
            return
        end(call.guard, outcome)
        self.under_way.remove(call)
        if call.period is not self.period or outcome in NEITHER:
            return
        if outcome is None:
            self.failures = 0
            self.successes += 1
            if self.state == "half_open" and self.successes == HALF_OPEN_CALLS:
                self.become("closed")
        else:
            self.failures += 1
            if self.state == "half_open" or self.failures == THRESHOLD:
                self.become("open")
                self.failures = 0

    @invariant()
    def states_agree(self) -> None:
        """The breaker is in the state that the rules say."""
        assert self.breaker.state == self.state


TestBreaker = Breaker.TestCase
TestBreaker.settings = settings(max_examples=200, stateful_step_count=60)


def test_failures_in_a_row_open_it(breaker: DatabaseCircuitBreaker) -> None:
    """A success between failures begins the count anew; an error in the data or a cancellation does not touch it."""
    for outcome in (FAILURE, FAILURE, None, FAILURE, *NEITHER, FAILURE):
        run(breaker, outcome)
    assert state(breaker) == "closed"

    run(breaker, FAILURE)

    assert state(breaker) == "open"


def test_a_refusal_is_one_line_that_says_when(breaker: DatabaseCircuitBreaker, clock: Clock) -> None:
    """Who is refused hears where, why, for how long, and which setting it is; the call does not begin."""
    open_it(breaker)
    clock.now += 3.5

    with pytest.raises(ServiceUnavailable) as caught:
        begin(breaker)

    assert str(caught.value) == (
        "PostgreSQL at db.example:5432/stamps is left alone after 3 failures in a row; "
        "next try in 7 s (DB_CIRCUIT_BREAKER_RECOVERY_TIMEOUT)"
    )
    assert caught.value.retriable


def test_half_open_lets_so_many_at_once_through(breaker: DatabaseCircuitBreaker, clock: Clock) -> None:
    """After the timeout the next calls are tries; one too many is refused at once, and may when one of them is over."""
    open_it(breaker)
    clock.now += TIMEOUT_SECONDS
    tries = [begin(breaker) for _ in range(HALF_OPEN_CALLS)]

    with pytest.raises(ServiceUnavailable, match="by at most 2 calls at once"):
        begin(breaker)
    end(tries[0])
    end(begin(breaker))

    assert state(breaker) == "closed"


@pytest.mark.parametrize("outcome", NEITHER, ids=lambda outcome: type(outcome).__name__)
def test_a_try_without_a_verdict_gives_its_place_back(
    breaker: DatabaseCircuitBreaker, clock: Clock, outcome: BaseException
) -> None:
    """A cancelled try leaves room for another one: else the breaker would stay half open for ever."""
    open_it(breaker)
    clock.now += TIMEOUT_SECONDS
    for _ in range(3 * HALF_OPEN_CALLS):
        run(breaker, outcome)
    assert state(breaker) == "half_open"

    for _ in range(HALF_OPEN_CALLS):
        run(breaker)

    assert state(breaker) == "closed"


def test_one_failed_try_opens_it_again(breaker: DatabaseCircuitBreaker, clock: Clock) -> None:
    """A server that fails again is left alone for the whole timeout, counted from then, and its successes forgotten."""
    open_it(breaker)
    clock.now += TIMEOUT_SECONDS
    run(breaker)
    run(breaker, FAILURE)
    clock.now += TIMEOUT_SECONDS - 1
    assert state(breaker) == "open"

    clock.now += 1
    run(breaker)

    assert state(breaker) == "half_open"


@pytest.mark.parametrize("outcome", [None, FAILURE])
def test_a_late_result_says_nothing(
    breaker: DatabaseCircuitBreaker, clock: Clock, outcome: BaseException | None
) -> None:
    """How a call from before the outage ends neither opens, closes nor prolongs anything, nor makes room for a try."""
    late = [begin(breaker) for _ in range(2 + HALF_OPEN_CALLS)]
    open_it(breaker)
    clock.now += TIMEOUT_SECONDS / 2
    end(late[0], outcome)
    clock.now += TIMEOUT_SECONDS / 2
    assert state(breaker) == "half_open"
    tries = [begin(breaker) for _ in range(HALF_OPEN_CALLS)]
    for call in late[1:-1]:
        end(call, outcome)
    assert state(breaker) == "half_open"
    with pytest.raises(ServiceUnavailable):
        begin(breaker)
    for call in tries:
        end(call)
    end(late[-1], outcome)
    for _ in range(THRESHOLD - 1):
        run(breaker, FAILURE)

    assert state(breaker) == "closed"


def test_what_goes_on_in_the_background_is_refused_while_it_is_open(
    breaker: DatabaseCircuitBreaker, clock: Clock
) -> None:
    """What is no call of anybody asks without counting, and is let through as soon as the database may be tried."""
    breaker.refuse_while_open(PLACE)
    open_it(breaker)
    with pytest.raises(ServiceUnavailable, match="is left alone"):
        breaker.refuse_while_open(PLACE)

    clock.now += TIMEOUT_SECONDS

    breaker.refuse_while_open(PLACE)


def test_opening_and_closing_are_logged(breaker: DatabaseCircuitBreaker, clock: Clock) -> None:
    """One line each, with what it counted and how long the database was away, over several openings."""
    with capture_logs() as lines:
        open_it(breaker)
        clock.now += TIMEOUT_SECONDS
        run(breaker, FAILURE)
        clock.now += TIMEOUT_SECONDS
        for _ in range(HALF_OPEN_CALLS):
            run(breaker)

    opened = {
        "event": "breaker_opened",
        "log_level": "warning",
        "place": PLACE,
        "error": "ConnectionResetError: gone",
        "recovery_timeout_seconds": 10.0,
    }
    assert lines == [
        opened | {"failures": 3},
        opened | {"failures": 4},
        {"event": "breaker_closed", "log_level": "info", "place": PLACE, "successes": 2, "away_seconds": 20.0},
    ]


def test_it_is_made_from_the_settings(clock: Clock) -> None:
    """DB_CIRCUIT_BREAKER_* are its bounds."""
    config = Settings(
        db_circuit_breaker_failure_threshold=1,
        db_circuit_breaker_recovery_timeout=7,
        db_circuit_breaker_half_open_max_calls=1,
    )
    breaker = DatabaseCircuitBreaker.from_config(config, clock=clock)
    run(breaker, FAILURE)
    with pytest.raises(ServiceUnavailable, match="after 1 failure; next try in 7 s"):
        begin(breaker)
    clock.now += 7

    run(breaker)

    assert state(breaker) == "closed"
