"""Alembic migrations of the PostgreSQL schema; run them with `stampline migrate`."""
