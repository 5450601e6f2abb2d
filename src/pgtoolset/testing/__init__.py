"""For tests and demos: PostgreSQL itself, databases on it, and doubles that need none."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
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

if not TYPE_CHECKING:  # a checker would otherwise accept every name of the package
    #: The names of each module that is imported when one of them is first used: a run of tests
    #: that needs a database does not wait for the import of the doubles.
    _NAMES = {
        "clients": ("create_test_client",),
        "db_sessions": ("create_db_session",),
        "doubles": (
            "ManualClock",
            "MemoryAssociations",
            "MemoryDatabase",
            "MemoryLocks",
            "MemorySession",
            "MemoryWatcher",
        ),
        "server": ("EmbeddedServer",),
        "workers": ("create_worker_database", "worker_database_url"),
    }
    _HOMES = {name: module for module, names in _NAMES.items() for name in names}

    def __getattr__(name: str) -> Any:
        """Import a name that is first used."""
        if name in _HOMES:
            value = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
        elif name in _NAMES:
            value = import_module(f"{__name__}.{name}")
        else:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return globals().setdefault(name, value)

    def __dir__() -> list[str]:
        """Return the names, also of what nothing has used yet."""
        return sorted({*globals(), *__all__, *_NAMES})
