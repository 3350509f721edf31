"""What alembic runs for every command: it migrates the connection that `migrations.run` hands over."""

from __future__ import annotations

from typing import Any

from alembic import context

from migrations.schema import HISTORY_PARTITION, SCHEMA, metadata


def _is_ours(name: str | None, kind: str, _parents: Any) -> bool:
    """Keep autogenerate away from other people's schemas and from the partitions of the history."""
    if kind == "schema":
        return name == SCHEMA
    return kind != "table" or HISTORY_PARTITION.fullmatch(name or "") is None


context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=metadata,
    version_table_schema=SCHEMA,
    include_schemas=True,
    include_name=_is_ours,
    compare_server_default=True,
    transaction_per_migration=True,
)
with context.begin_transaction():
    context.run_migrations()
