"""Doubles that satisfy the protocols of pgtoolset in memory, without a database and without an
ORM."""

from pgtoolset.testing.doubles._clock import Clock, LoopClock, ManualClock
from pgtoolset.testing.doubles._refusals import NoResult
from pgtoolset.testing.doubles._rows import MemoryRow
from pgtoolset.testing.doubles._work import Event
from pgtoolset.testing.doubles.associations import MemoryAssociations
from pgtoolset.testing.doubles.database import MemoryDatabase
from pgtoolset.testing.doubles.locks import MemoryLocks
from pgtoolset.testing.doubles.session import MemorySession
from pgtoolset.testing.doubles.watching import MemoryChanges, MemoryWatcher

__all__ = [
    "Clock",
    "Event",
    "LoopClock",
    "ManualClock",
    "MemoryAssociations",
    "MemoryChanges",
    "MemoryDatabase",
    "MemoryLocks",
    "MemoryRow",
    "MemorySession",
    "MemoryWatcher",
    "NoResult",
]
