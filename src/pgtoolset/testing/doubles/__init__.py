"""Doubles that satisfy the protocols of pgtoolset in memory: deterministic, with a log, without a
database."""

from pgtoolset.testing.doubles._clock import Clock, LoopClock, ManualClock
from pgtoolset.testing.doubles._store import Event
from pgtoolset.testing.doubles.associations import MemoryAssociations
from pgtoolset.testing.doubles.database import MemoryDatabase
from pgtoolset.testing.doubles.locks import MemoryLocks
from pgtoolset.testing.doubles.session import MemorySession
from pgtoolset.testing.doubles.watching import MemoryWatcher

__all__ = [
    "Clock",
    "Event",
    "LoopClock",
    "ManualClock",
    "MemoryAssociations",
    "MemoryDatabase",
    "MemoryLocks",
    "MemorySession",
    "MemoryWatcher",
]
