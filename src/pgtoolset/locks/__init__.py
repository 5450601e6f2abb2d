"""Locks that say who is in the way: of tables, of rows, and of keys that only the application
knows."""

from pgtoolset.locks.advisory import advisory_lock
from pgtoolset.locks.rows import lock_rows
from pgtoolset.locks.tables import lock_tables
from pgtoolset.locks.waits import list_lock_waits

__all__ = ["advisory_lock", "list_lock_waits", "lock_rows", "lock_tables"]
