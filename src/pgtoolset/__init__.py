"""Honest sessions and nesting transactions for FastAPI, SQLAlchemy's AsyncSession and asyncpg on PostgreSQL."""

from pgtoolset.errors import (
    PgToolsetError,
    TransactionAbortedError,
    TransactionStateError,
    UnsupportedVersionError,
)
from pgtoolset.sessions import create_db_context, create_db_dependency
from pgtoolset.transactions import IsolationLevel, get_transaction, on_commit, run_transaction

__all__ = [
    "IsolationLevel",
    "PgToolsetError",
    "TransactionAbortedError",
    "TransactionStateError",
    "UnsupportedVersionError",
    "create_db_context",
    "create_db_dependency",
    "get_transaction",
    "on_commit",
    "run_transaction",
]
