"""For tests and demos: PostgreSQL itself, databases on it, and doubles that need none."""

from pgtoolset.testing.clients import create_test_client
from pgtoolset.testing.db_sessions import create_db_session
from pgtoolset.testing.doubles import (
    ManualClock,
    MemoryAssociations,
    MemoryDatabase,
    MemoryLocks,
    MemorySession,
    MemoryWatcher,
)
from pgtoolset.testing.server import EmbeddedServer
from pgtoolset.testing.workers import create_worker_database, worker_database_url

__all__ = [
    "EmbeddedServer",
    "ManualClock",
    "MemoryAssociations",
    "MemoryDatabase",
    "MemoryLocks",
    "MemorySession",
    "MemoryWatcher",
    "create_db_session",
    "create_test_client",
    "create_worker_database",
    "worker_database_url",
]
