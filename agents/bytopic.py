"""A role that reads several topics, put together of one role for each of them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from faust.types import TP

from pipeline.lanes import Role


class ByTopic:
    """Gives each partition to the role of its topic; see `pipeline.lanes.SeveralTopics`.

    Args:
        roles: the role of each topic, by its name with the prefix; the main topic comes first.
    """

    def __init__(self, roles: Mapping[str, Role]) -> None:
        self._roles = roles

    @property
    def main_topic(self) -> str:
        """The topic whose partitions are called by their numbers alone."""
        return next(iter(self._roles))

    async def open(self, tp: TP, consumer: Any) -> int:
        """Take over a partition."""
        return await self._roles[tp.topic].open(tp, consumer)

    async def close(self, tp: TP) -> None:
        """Let go of a partition."""
        await self._roles[tp.topic].close(tp)

    def retain(self, tps: Iterable[TP]) -> None:
        """Have each role forget the partitions that are not among these."""
        kept = set(tps)
        for role in self._roles.values():
            role.retain(kept)
