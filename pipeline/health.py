"""The health pages of a node: what it says of itself over HTTP, on Faust's web view (loopback only).

=============== ==================================================================================================
/health         the services as this node meets them; 503 where one that it cannot work without does not answer
/health/live    200: the process answers, there is no need to end it
/health/ready   what each partition of each role is doing; 503 until all of them are live
/health/startup 503 until the node was ready for the first time, 200 for ever after
/metrics        what the node has counted, as text for Prometheus (`pipeline/metrics.py`)
=============== ==================================================================================================

Nothing is asked for a page: it tells what the node's own work has met. So a page never hangs, and a database that went
away is known with the next batch. Imports nothing of ours but the names of states, errors and partitions.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

from aiohttp.web import Request, Response, UrlDispatcher, json_response
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest

from pipeline.breaker import State
from pipeline.errors import ServiceUnavailable, StamplineError
from pipeline.lanes import Label

Level: TypeAlias = Literal["healthy", "degraded", "unhealthy"]

_DATABASE_LEVELS: dict[State, Level] = {"closed": "healthy", "half_open": "degraded", "open": "unhealthy"}


@dataclass(frozen=True, slots=True)
class RoleState:
    """One role of a node: what its partitions are doing, and what Kafka was to it."""

    partitions: Mapping[Label, str]
    #: Joined its group, and all partitions that it was given are live.
    ready: bool
    #: The group's coordinator is known and has told which partitions are ours.
    reaches_kafka: bool
    #: Why partitions are not live, where it was an error of ours.
    faults: Sequence[StamplineError] = ()
    #: Whether its work needs the database, which then may be what a fault is about.
    uses_database: bool = False
    #: What the copy of each partition is doing that this node would take over.
    copies: Mapping[int, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class NodeState:
    """A node at one moment: all that its pages are made of."""

    #: Who answers: an address may be another's by now.
    name: str
    roles: Mapping[str, RoleState]
    #: The breaker in front of the database, None where no role uses it.
    breaker: State | None
    started: bool
    uptime_seconds: float

    @property
    def ready(self) -> bool:
        """Whether every role is."""
        return all(role.ready for role in self.roles.values())


def health(state: NodeState) -> dict[str, Any]:
    """Return the answer to `/health`.

    The node is unhealthy with its database; it is degraded where Kafka is away or where a partition is not live, as
    it then works on alone once that has passed.
    """
    database = _DATABASE_LEVELS[state.breaker] if state.breaker is not None else "disabled"
    kafka: Level = "healthy" if all(map(_has_kafka, state.roles.values())) else "degraded"
    status: Level = "healthy" if state.ready else "degraded"
    for level in ("degraded", "unhealthy"):
        if level in {database, kafka}:
            status = level
    return {
        "status": status,
        "components": {"database": database, "cache": "disabled", "kafka": kafka},
        "uptime_seconds": int(state.uptime_seconds),
    }


def _has_kafka(role: RoleState) -> bool:
    # Where a role uses both services, its coordinator tells of Kafka: a fault may be about either.
    away = not role.uses_database and any(isinstance(fault, ServiceUnavailable) for fault in role.faults)
    return role.reaches_kafka and not away


def readiness(state: NodeState) -> dict[str, Any]:
    """Return the answer to `/health/ready`."""
    return {
        "ready": state.ready,
        "node": state.name,
        "roles": {name: _by_text(role.partitions) for name, role in state.roles.items()},
        "standbys": {name: _by_text(role.copies) for name, role in state.roles.items() if role.copies},
    }


def _by_text(statuses: Mapping[Label, str] | Mapping[int, str]) -> dict[str, str]:
    """Return a status by partition as JSON has it: keys are text."""
    labels = {str(label): status for label, status in statuses.items()}
    return {label: labels[label] for label in sorted(labels, key=label_order)}


def label_order(label: str) -> tuple[str, int]:
    """Return what labels of partitions are sorted by: the main topic, which has no name, before all others."""
    topic, _, number = label.rpartition("/")
    return topic, int(number)


def has_failed(status: str) -> bool:
    """Whether a partition's status tells of a failure: it is neither live nor on its way there."""
    return status not in {"live", "opening"} and not status.startswith("recovering")


def add_pages(router: UrlDispatcher, look: Callable[[], NodeState]) -> None:
    """Add the pages to a web application that has not started yet; `look` tells how the node is."""

    async def show_health(_request: Request) -> Response:
        answer = health(look())
        return json_response(answer, status=503 if answer["status"] == "unhealthy" else 200)

    async def show_live(_request: Request) -> Response:
        return json_response({"live": True})

    async def show_ready(_request: Request) -> Response:
        answer = readiness(look())
        return json_response(answer, status=200 if answer["ready"] else 503)

    async def show_startup(_request: Request) -> Response:
        started = look().started
        return json_response({"started": started}, status=200 if started else 503)

    router.add_get("/health", show_health)
    router.add_get("/health/live", show_live)
    router.add_get("/health/ready", show_ready)
    router.add_get("/health/startup", show_startup)


def add_metrics_page(router: UrlDispatcher, registry: CollectorRegistry) -> None:
    """Add `/metrics` to a web application that has not started yet."""

    async def show_metrics(_request: Request) -> Response:
        return Response(body=generate_latest(registry), headers={"Content-Type": CONTENT_TYPE_LATEST})

    router.add_get("/metrics", show_metrics)
