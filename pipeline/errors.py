"""Every error that stampline raises on purpose.

The tree, with what the runtime does on each::

    StamplineError                 one line for a person: what is wrong and what to do
    ├── SettingsError              the environment is wrong: refuse to start
    ├── InvalidToken               no producer got this token: the caller is told
    ├── ServiceUnavailable         Kafka or PostgreSQL does not answer      retriable
    ├── TopicError                 a topic is missing or has another shape: refuse to start
    ├── PositionLost               the log no longer holds our position: stop that partition
    ├── PartitionFenced            another process owns the partition: drop it
    ├── BatchAborted               the batch left no trace, try it again    retriable
    ├── RowsRefused                PostgreSQL does not take rows of the batch: dead letters if it is about single
    │                              records, else stop that partition
    ├── WorkCancelled              something inside a batch was cancelled: open the partition again
    ├── RecoveryFailed             a changelog cannot be restored: stop that partition
    └── InputRejected              one input is bad: dead letter, the partition goes on
        └── ContentUnavailable     the file behind the uri cannot be had

An adapter translates the errors of its driver (`raise … from`); nobody else names them.
Imports nothing of ours.
"""

from __future__ import annotations

from typing import ClassVar


class StamplineError(Exception):
    """Something went wrong in stampline."""

    #: True where the same call may succeed later without anybody's help.
    retriable: ClassVar[bool] = False

    def __init__(self, message: str | None = None) -> None:
        super().__init__(message or type(self).__doc__)


class SettingsError(StamplineError):
    """The settings are not valid."""


class InvalidToken(StamplineError):
    """A token is what a producer gets for its event: file-events:PARTITION:OFFSET."""


class ServiceUnavailable(StamplineError):
    """A service that stampline needs does not answer."""

    retriable = True


class TopicError(StamplineError):
    """A topic is missing or has another shape than its neighbours; run `stampline topics check`."""


class PositionLost(StamplineError):
    """The log does not hold the position of this consumer any more."""


class PartitionFenced(StamplineError):
    """Another process has taken over this partition."""


class BatchAborted(StamplineError):
    """The batch was given up without a trace and can be tried again."""

    retriable = True


class RowsRefused(StamplineError):
    """PostgreSQL does not take these rows."""


class WorkCancelled(StamplineError):
    """The work on a batch was cancelled from inside."""


class RecoveryFailed(StamplineError):
    """The changelog of a table cannot be restored."""


class InputRejected(StamplineError):
    """An input cannot be used.

    Args:
        reason: the stable code that dead letters and outcomes carry, for example ``undecodable``.
        detail: one sentence for the person who sent it.
    """

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.detail = detail


class ContentUnavailable(InputRejected):
    """The content that an event points to cannot be had."""
