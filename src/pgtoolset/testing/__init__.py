"""PostgreSQL for tests and demos, and databases for tests."""

from pgtoolset.testing.server import EmbeddedServer
from pgtoolset.testing.workers import create_worker_database, worker_database_url

__all__ = ["EmbeddedServer", "create_worker_database", "worker_database_url"]
