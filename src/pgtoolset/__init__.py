"""Honest sessions and nesting transactions for FastAPI, SQLAlchemy's AsyncSession and asyncpg on
PostgreSQL."""

from pgtoolset._native import implementation
from pgtoolset.cleanup import cleanup_tables
from pgtoolset.databases import create_database, drop_database
from pgtoolset.errors import (
    DatabaseExistsError,
    DatabaseInUseError,
    DatabaseNotFoundError,
    LockTimeoutError,
    OutsideReferenceError,
    PgToolsetError,
    RowDeletedError,
    RowNotFoundError,
    TransactionAbortedError,
    TransactionStateError,
    UnsupportedVersionError,
    WaitTimeoutError,
    WatcherClosedError,
    WatchFailedError,
)
from pgtoolset.locks import advisory_lock, list_lock_waits, lock_rows, lock_tables
from pgtoolset.m2m import m2m_add, m2m_add_many, m2m_remove, m2m_set
from pgtoolset.sessions import create_db_context, create_db_dependency
from pgtoolset.transactions import IsolationLevel, get_transaction, on_commit, run_transaction
from pgtoolset.values import Blocker, LockMode, LockWait, M2MChange, RowChange, RowLockMode
from pgtoolset.watch import RowWatcher, row_change_trigger, wait_for_row_change

__all__ = [
    "Blocker",
    "DatabaseExistsError",
    "DatabaseInUseError",
    "DatabaseNotFoundError",
    "IsolationLevel",
    "LockMode",
    "LockTimeoutError",
    "LockWait",
    "M2MChange",
    "OutsideReferenceError",
    "PgToolsetError",
    "RowChange",
    "RowDeletedError",
    "RowLockMode",
    "RowNotFoundError",
    "RowWatcher",
    "TransactionAbortedError",
    "TransactionStateError",
    "UnsupportedVersionError",
    "WaitTimeoutError",
    "WatchFailedError",
    "WatcherClosedError",
    "advisory_lock",
    "cleanup_tables",
    "create_database",
    "create_db_context",
    "create_db_dependency",
    "drop_database",
    "get_transaction",
    "implementation",
    "list_lock_waits",
    "lock_rows",
    "lock_tables",
    "m2m_add",
    "m2m_add_many",
    "m2m_remove",
    "m2m_set",
    "on_commit",
    "row_change_trigger",
    "run_transaction",
    "wait_for_row_change",
]
