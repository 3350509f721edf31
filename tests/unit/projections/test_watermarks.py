"""The arithmetic of the watermarks."""

from __future__ import annotations

import pytest

from pipeline.errors import PositionLost
from projections.watermarks import PROJECTIONS, agree

pytestmark = pytest.mark.unit


def test_projections_that_agree_go_on_together() -> None:
    """The feed offset is the one at which all projections stand."""
    assert agree(3, dict.fromkeys(PROJECTIONS, 4711)) == 4711


def test_projections_that_stand_apart_stop_the_partition() -> None:
    """The message names the partition, where each projection stands, and the command that helps."""
    with pytest.raises(PositionLost, match=r"partition 3 .*files at 9.*file_history was changed by hand") as caught:
        agree(3, dict.fromkeys(PROJECTIONS, 9) | {"file_history": 2})

    assert not caught.value.retriable
