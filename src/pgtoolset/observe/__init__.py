"""What happens in an engine, as events: transactions, waits, retries, and looks of watchers.

The application imports it by name: `from pgtoolset.observe import subscribe`.
"""

from pgtoolset.events import (
    CommitResolved,
    Event,
    LockKind,
    LockWaited,
    Observer,
    PoolOutcome,
    PoolWaited,
    Resolved,
    Retried,
    TransactionEnded,
    TransactionOutcome,
    WatcherLooked,
)
from pgtoolset.observe.subscriptions import subscribe

__all__ = [
    "CommitResolved",
    "Event",
    "LockKind",
    "LockWaited",
    "Observer",
    "PoolOutcome",
    "PoolWaited",
    "Resolved",
    "Retried",
    "TransactionEnded",
    "TransactionOutcome",
    "WatcherLooked",
    "subscribe",
]
