"""Where a partition goes on, and what is said where its log does not hold that place."""

from __future__ import annotations

import pytest
from faust.types import TP

from agents.positions import committed_position
from pipeline.errors import PositionLost
from pipeline.transport import LogRange

pytestmark = pytest.mark.unit

TOPIC = TP("file-stamps", 3)


@pytest.mark.parametrize(
    ("log_range", "position"),
    [
        (LogRange(0, 0, None), 0),
        (LogRange(5, 9, None), 5),
        (LogRange(5, 9, 5), 5),
        (LogRange(5, 9, 9), 9),
        # The embedded broker does not tell the end.
        (LogRange(0, None, 9), 9),
    ],
)
def test_it_goes_on_where_it_was(log_range: LogRange, position: int) -> None:
    """At the committed offset; at the first there is where nothing was committed."""
    assert committed_position(TOPIC, log_range, done="reduced") == position


@pytest.mark.parametrize(
    ("log_range", "said"),
    [
        (LogRange(8, 9, 5), "file-stamps partition 3: offsets 5 to 7 are gone by retention and were not reduced"),
        (LogRange(0, 4, 5), "file-stamps partition 3 ends at 4, but is reduced up to 5: it was made anew"),
        (LogRange(0, 0, 5), "file-stamps partition 3 ends at 0, but is reduced up to 5: it was made anew"),
    ],
)
def test_a_lost_place_is_an_error_that_names_the_offsets(log_range: LogRange, said: str) -> None:
    """Never a silent jump: neither over what retention took, nor into another log by the same name."""
    with pytest.raises(PositionLost) as caught:
        committed_position(TOPIC, log_range, done="reduced")

    assert str(caught.value) == said
