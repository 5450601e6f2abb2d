"""Locks on tables, on rows and on keys of the application, with errors that name the blockers."""

from pgtoolset.locks.advisory import advisory_lock
from pgtoolset.locks.rows import lock_rows
from pgtoolset.locks.tables import lock_tables
from pgtoolset.locks.waits import list_lock_waits

__all__ = ["advisory_lock", "list_lock_waits", "lock_rows", "lock_tables"]
