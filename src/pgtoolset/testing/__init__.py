"""PostgreSQL for tests and demos."""

from pgtoolset.testing.server import EmbeddedServer

__all__ = ["EmbeddedServer"]
